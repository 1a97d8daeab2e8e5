"""The shared score network: the frozen UNet with a LoRA adapter and a camera condition."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from distvsd.score.adapter import AsPrior, Init, adapted_unet, adapter_parameters
from distvsd.score.base import Optimizer
from distvsd.score.camera import CAMERA_FEATURES
from distvsd.score.optimizer import AdapterOptimizer
from distvsd.score.replay import Replay
from distvsd.score.stored import (
    ADAPTER_CONFIG_FILE,
    OPTIMIZER_FILE,
    REPLAY_FILE,
    files_of,
    place,
    refuse_unfit,
)
from distvsd.vsd.process import PredictionType, add_noise, target, to_eps
from distvsd.vsd.samples import Samples, slices


class LoraOptions(Protocol):
    """What is read of the configuration's `score` block; meanings and ranges are documented there."""

    @property
    def rank(self) -> int: ...
    @property
    def init(self) -> Init: ...
    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def eps(self) -> float: ...
    @property
    def warmup(self) -> int: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def max_grad_norm(self) -> float: ...
    @property
    def replay_rounds(self) -> int: ...


class LoraScore:
    """eps_phi of Eq. 9 (arXiv 2305.16213): a LoRA of the prior, told the camera, shared by all particles.

    unet: the prior's frozen UNet2DConditionModel; its tensors are shared, never copied and never changed.
    alphas_cumprod: [T]. text_of: particle ids [N] -> text embeddings [N, L, D], the bare prompts. seed: of the
    adapter's initial values, equal on every rank. micro_batch: samples per UNet call in `eps` and `loss`, 0 = all.
    reads_cameras: without it the network has no camera condition, and no call reads the cameras that it is given.
    Raises BackendError for a UNet with class conditioning. Nothing here communicates, unless a strategy has spread the
    network or the optimiser over ranks: then every call of the network, or `state`, is every rank's.

    replay: the recent renders; left_out: optimiser steps that all ranks left out, one after another, up to now, over
    rounds. Both are saved and restored with the network. local: the optimiser of whole parameters; holder:
    who has the trained numbers and the moments, `local` or the strategy that took them over.
    """

    def __init__(
        self,
        unet: nn.Module,
        alphas_cumprod: Tensor,
        prediction_type: PredictionType,
        text_of: Callable[[Tensor], Tensor],
        config: LoraOptions,
        seed: int,
        device: torch.device | str,
        micro_batch: int = 0,
        reads_cameras: bool = True,
    ) -> None:
        self._alphas_cumprod = alphas_cumprod.to(device=device, dtype=torch.float32)
        self._prediction_type = prediction_type
        self._text_of = text_of
        self._micro_batch = micro_batch
        self._dtype = next(unet.parameters()).dtype
        self._peft, camera = adapted_unet(unet, config.rank, config.init, seed, reads_cameras, device)
        self._unet: Any = self._peft.get_base_model()
        self._adapter = adapter_parameters(self._peft)
        named = camera.named_parameters() if camera is not None else ()
        self._camera = {f"camera.{name}": parameter for name, parameter in named}
        self.trainable: dict[str, Parameter] = self._adapter | self._camera
        self._base_class = type(self._unet)  # sharding puts another in its place
        self.local = AdapterOptimizer(
            self.trainable, config.weight_decay, config.betas, config.eps, config.warmup, config.max_grad_norm
        )
        self.holder: Optimizer = self.local
        self.replay = Replay(config.replay_rounds, device)
        self.left_out = 0

    @property
    def num_timesteps(self) -> int:
        return len(self._alphas_cumprod)

    @property
    def num_parameters(self) -> tuple[int, int]:
        """Trained numbers in (adapter, camera condition)."""
        return sum(p.numel() for p in self._adapter.values()), sum(p.numel() for p in self._camera.values())

    @property
    def num_steps(self) -> int:
        """Steps taken since the run began, across resumes; the warm-up counts by it."""
        return self.holder.num_steps

    @property
    def network(self) -> nn.Module:
        """The UNet with its LoRA layers and the camera condition in it."""
        return self._unet  # type: ignore[no-any-return]

    def as_prior(self) -> nn.Module:
        """The UNet as it was before the adapter, by switching the adapter off: for the prior, when only one is held."""
        return AsPrior(self._peft)

    @torch.no_grad()
    def eps(self, noisy: Tensor, timesteps: Tensor, ids: Tensor, cameras: Tensor | None) -> Tensor:
        """See `Score.eps`. Without a camera the network sees what it sees in training when the camera is dropped: 0."""
        if cameras is None:
            cameras = noisy.new_zeros(len(noisy), CAMERA_FEATURES)
        outputs = [
            self._predict(noisy[rows], timesteps[rows], ids[rows], cameras[rows])
            for rows in slices(len(noisy), self._micro_batch)
        ]
        return to_eps(torch.cat(outputs), noisy.float(), self._alphas_cumprod[timesteps], self._prediction_type)

    def loss(self, samples: Samples, timesteps: Tensor, noise: Tensor, keep_camera: Tensor) -> Tensor:
        """See `Score.loss`. Eq. 7 in the prediction type of the base (v = alpha eps - sigma x0 for velocity).

        noise [N, C, h, w]; keep_camera [N] bool, False zeroes the camera. A masked sample's latents and camera count
        as zeros, so that its loss is finite; giving it no weight is up to the caller.
        """
        batches = slices(len(samples), self._micro_batch)
        losses = [self._loss(samples[b], timesteps[b], noise[b], keep_camera[b]) for b in batches]
        return torch.cat(losses) if losses else noise.new_zeros(0, dtype=torch.float32)

    def gradients(
        self,
        samples: Samples,
        timesteps: Tensor,
        noise: Tensor,
        keep_camera: Tensor,
        denominator: float,
        micro_batches: Sequence[slice],
    ) -> tuple[Iterator[Tensor], Tensor]:
        """One flat float32 gradient [G] for each micro-batch, and the detached losses of all samples, [N].

        A gradient is computed when the iterator is asked for it, so that not all are held; the losses of its rows are
        written then, and are whole when the iterator has ended.
        A micro-batch's gradient is that of sum_i weight_i loss_i / denominator over its rows, so their sum is the
        whole batch's. denominator: the global weight, say, equal on every rank. micro_batches: slices that cover the
        rows once, each one UNet call. A masked sample (weight 0) changes no bit, whatever it holds; its loss reads 0.
        """
        losses = noise.new_zeros(len(samples), dtype=torch.float32)
        scale = self.loss_scale(samples.latents, denominator)

        def flat(rows: slice) -> Tensor:
            batch = samples[rows]
            if not len(batch):
                return noise.new_zeros(sum(self.num_parameters), dtype=torch.float32)
            factor = scale / denominator
            objective, losses[rows] = self.objective(batch, timesteps[rows], noise[rows], keep_camera[rows], factor)
            gradients = torch.autograd.grad(objective, list(self.trainable.values()))
            return torch.cat([gradient.reshape(-1) for gradient in gradients]) / scale

        return map(flat, micro_batches), losses

    def objective(
        self, samples: Samples, timesteps: Tensor, noise: Tensor, keep_camera: Tensor, factor: float
    ) -> tuple[Tensor, Tensor]:
        """sum_i weight_i loss_i * factor with its graph, in one UNet call, and the detached losses [N]; N > 0.

        A masked sample (weight 0) changes no bit, whatever it holds; its loss reads 0.
        """
        loss = self._loss(samples, timesteps, noise, keep_camera)
        valid = samples.weight > 0
        objective = torch.where(valid, samples.weight * loss, 0.0).sum() * factor
        return objective, torch.where(valid, loss.detach(), 0.0)

    def step(self, flat_gradient: Tensor, learning_rate: float) -> None:
        """One AdamW step with `flat_gradient` [G] float32, which is left as it is.

        learning_rate is multiplied by the linear warm-up, (steps taken + 1) / warmup up to 1. With max_grad_norm the
        gradient is scaled down to that norm. Every rank calls it with the same gradient, already known to be finite.
        """
        self.local.step(flat_gradient, learning_rate)

    def loss_scale(self, latents: Tensor, denominator: float) -> float:
        """A power of two that keeps float16 activations' gradients from rounding to zero: undoes both means' size."""
        if self._dtype != torch.float16:
            return 1.0
        return 2.0 ** round(math.log2(max(latents[0].numel() * denominator, 1.0))) if len(latents) else 1.0

    def state(self) -> dict[str, dict[str, Tensor]]:
        """See `Score.state`. `score/adapter_model.safetensors` is what peft's save_pretrained writes."""
        files: dict[str, dict[str, Tensor]] = {}
        for name, value in self.holder.values().items():
            file, stored_as = place(name)
            files.setdefault(file, {})[stored_as] = value
        counts = {"num_steps": self.num_steps, "left_out": self.left_out}
        files[OPTIMIZER_FILE] = {name: torch.tensor(count, dtype=torch.int64) for name, count in counts.items()} | {
            f"{name}.{moment}": value
            for name, moments in self.holder.moments().items()
            for moment, value in moments.items()
        }
        snapshot = {
            file: {name: _snapshot(value) for name, value in tensors.items()} for file, tensors in files.items()
        }
        return snapshot | {REPLAY_FILE: self.replay.state()}

    def texts(self) -> dict[str, str]:
        """`score/adapter_config.json` as peft's save_pretrained writes it, with sets in sorted order."""
        settings = self._peft.peft_config["default"].to_dict() | {
            "inference_mode": True,
            "auto_mapping": {
                "base_model_class": self._base_class.__name__,
                "parent_library": self._base_class.__module__,
            },
        }
        text = json.dumps(settings, indent=2, sort_keys=True, default=sorted)
        return {ADAPTER_CONFIG_FILE: text}

    def load_state(self, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        """See `Score.load_state`. What is not this network's is ignored; nothing changes when it raises."""
        shapes = {name: parameter.shape for name, parameter in self.trainable.items()}
        for file in files_of(shapes):
            if file != REPLAY_FILE:  # whose owner looks at it
                refuse_unfit(file, shapes, files.get(file, {}))
        optimizer = files[OPTIMIZER_FILE]
        num_steps = int(optimizer["num_steps"])
        moments = {
            name: {moment: optimizer[f"{name}.{moment}"] for moment in ("step", "exp_avg", "exp_avg_sq")}
            for name in (shapes if num_steps else ())
        }
        places = {name: place(name) for name in shapes}
        values = {name: files[file][stored_as] for name, (file, stored_as) in places.items()}
        self.replay.load_state(files.get(REPLAY_FILE, {}))
        self.holder.restore(values, moments, num_steps)
        self.left_out = int(optimizer.get("left_out", 0))

    def _loss(self, samples: Samples, timesteps: Tensor, noise: Tensor, keep_camera: Tensor) -> Tensor:
        valid = samples.weight > 0
        latents = torch.where(valid[:, None, None, None], samples.latents.detach(), 0.0)
        cameras = torch.where((valid & keep_camera)[:, None], samples.cameras, 0.0)
        abar = self._alphas_cumprod[timesteps]
        output = self._predict(add_noise(latents, noise, abar), timesteps, samples.ids, cameras)
        return (output - target(latents, noise, abar, self._prediction_type)).square().flatten(1).mean(1)

    def _predict(self, noisy: Tensor, timesteps: Tensor, ids: Tensor, cameras: Tensor) -> Tensor:
        output: Tensor = self._unet(
            noisy.to(self._dtype),
            timesteps,
            encoder_hidden_states=self._text_of(ids).to(self._dtype),
            class_labels=cameras.float() if self._camera else None,
            return_dict=False,
        )[0]
        return output.float()


def _snapshot(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True).contiguous()
