"""A frozen network with LoRA layers and a camera condition: a second module tree that shares the first's tensors."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from distvsd.config import ScoreConfig
from distvsd.networks.base import Adaptable
from distvsd.score.camera import CameraEmbedding
from distvsd.vsd import rng
from distvsd.vsd.rng import Purpose


def adapted(
    base: Adaptable, config: ScoreConfig, seed: int, reads_cameras: bool, device: torch.device | str
) -> tuple[Any, CameraEmbedding | None]:
    """A peft model around a structural copy of the module, and the camera embedding installed in it, if it has one.

    lora_A is drawn here rather than by peft, in the order of the names, so that it depends neither on peft's order of
    modules nor on the base's dtype. config.init "normal" has the standard deviation 1 / rank of diffusers'
    LoRALinearLayer, which the paper's code uses; "kaiming" is peft's uniform, with 1 / sqrt(3 inputs). lora_B is zero:
    at first the adapter changes nothing.
    """
    from peft import LoraConfig, get_peft_model

    width = base.camera_width()
    settings = LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=list(base.lora_targets))
    with rng.seeded(seed, Purpose.SCORE_INIT):
        model = get_peft_model(_structural_copy(base.module), settings).eval()  # type: ignore[arg-type]
        camera = CameraEmbedding(width) if reads_cameras else None
        for index, (name, parameter) in enumerate(adapter_parameters(model).items()):
            parameter.data = parameter.data.to(device, torch.float32)
            if ".lora_A." in name:
                parameter.data.copy_(_first_factor(parameter.shape, config, seed, index))
    if camera is not None:
        base.add_camera(model.get_base_model(), camera.to(device))
    return model, camera


def _first_factor(shape: torch.Size, config: ScoreConfig, seed: int, lane: int) -> Tensor:
    """Called inside `rng.seeded`, which seeds the "kaiming" draw."""
    if config.init == "normal":
        return rng.normal(seed, Purpose.SCORE_INIT, [0], 0, shape, lane)[0] / config.rank
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5))


def _structural_copy(module: nn.Module) -> nn.Module:
    """A copy of the module tree with the same parameters and buffers: changes of its structure leave `module` alone."""
    tensors: itertools.chain[Tensor] = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def adapter_parameters(adapted: Any) -> dict[str, Parameter]:
    """The LoRA parameters in the order of the names peft saves them under, which leave the adapter's name out."""
    named = {name.replace(".default.", "."): p for name, p in adapted.named_parameters() if ".lora_" in name}
    return dict(sorted(named.items()))


class AdapterOff(nn.Module):
    """The base of an adapted network: adapter and camera are turned off during a call.

    For a network that is spread over ranks, where no rank can keep a second module tree. It gives the same bits as the
    original network. Not differentiable; no graph of the adapter may be pending across a call.
    """

    def __init__(self, base: Adaptable, model: Any) -> None:
        super().__init__()
        self._base = base
        self._model = [model]  # in a list: not a submodule, or its parameters would be counted twice

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model[0]
        module = model.get_base_model()
        camera = self._base.add_camera(module, None)
        model.base_model.disable_adapter_layers()
        try:
            with torch.no_grad():
                return module(*args, **kwargs)
        finally:
            model.base_model.enable_adapter_layers()
            self._base.add_camera(module, camera)
