"""The frozen UNet with LoRA layers and a camera condition: a second network on the tensors of the first."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from distvsd.score.camera import CameraEmbedding, attach_camera, time_embed_dim
from distvsd.vsd import rng
from distvsd.vsd.rng import Purpose

TARGET_MODULES = ["to_q", "to_k", "to_v", "to_out.0"]


Init = Literal["normal", "kaiming"]


def adapted_unet(
    unet: nn.Module, rank: int, init: Init, seed: int, reads_cameras: bool, device: torch.device | str
) -> tuple[Any, CameraEmbedding | None]:
    """A peft model around a structural copy of the UNet, and the camera embedding installed in it, if it has one.

    lora_A is drawn here rather than by peft, in the order of the names, so that it does not depend on peft's order of
    modules nor is rounded to the base's dtype. init "normal" has the standard deviation 1 / rank of diffusers'
    LoRALinearLayer, which the paper's code uses; "kaiming" is peft's uniform, with 1 / sqrt(3 inputs). lora_B is zero:
    the adapter starts as nothing.
    """
    from peft import LoraConfig, get_peft_model

    width = time_embed_dim(unet)
    settings = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGET_MODULES))
    with rng.seeded(seed, Purpose.SCORE_INIT):
        adapted = get_peft_model(_structural_copy(unet), settings).eval()  # type: ignore[arg-type]
        camera = CameraEmbedding(width) if reads_cameras else None
        for index, (name, parameter) in enumerate(adapter_parameters(adapted).items()):
            parameter.data = parameter.data.to(device, torch.float32)
            if ".lora_A." in name:
                parameter.data.copy_(_first_factor(parameter.shape, rank, init, seed, index))
    if camera is not None:
        attach_camera(adapted.get_base_model(), camera.to(device))
    return adapted, camera


def _first_factor(shape: torch.Size, rank: int, init: Init, seed: int, lane: int) -> Tensor:
    """Inside `rng.seeded`, from which the older of the two draws."""
    if init == "normal":
        return rng.normal(seed, Purpose.SCORE_INIT, [0], 0, shape, lane)[0] / rank
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5))


def _structural_copy(module: nn.Module) -> nn.Module:
    """The module tree anew, on the same parameters and buffers: changing its structure leaves `module` alone."""
    tensors: itertools.chain[Tensor] = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def adapter_parameters(adapted: Any) -> dict[str, Parameter]:
    """The LoRA parameters in the order of the names peft saves them under, which leave the adapter's name out."""
    named = {name.replace(".default.", "."): p for name, p in adapted.named_parameters() if ".lora_" in name}
    return dict(sorted(named.items()))


class AsPrior(nn.Module):
    """An adapted UNet as it was before: its adapter and its camera are off for the length of a call.

    For a network that is spread over ranks, of which nobody can keep a second tree of modules. The same bits as the
    UNet it was made of; no gradient passes, and no graph of the adapter's may be pending across a call.
    """

    def __init__(self, adapted: Any) -> None:
        super().__init__()
        self._adapted = [adapted]  # in a list: not a submodule, or its parameters would be counted twice

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        adapted = self._adapted[0]
        unet = adapted.get_base_model()
        camera, unet.class_embedding = unet.class_embedding, None
        adapted.base_model.disable_adapter_layers()
        try:
            with torch.no_grad():
                return unet(*args, **kwargs)
        finally:
            adapted.base_model.enable_adapter_layers()
            unet.class_embedding = camera
