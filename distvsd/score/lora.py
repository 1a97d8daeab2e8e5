"""The shared score network: a frozen network with a LoRA adapter and a camera condition."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from distvsd.config import ScoreConfig
from distvsd.networks.base import Adaptable, Condition
from distvsd.score.adapter import AdapterOff, adapted, adapter_parameters
from distvsd.score.base import OptimizerState
from distvsd.score.camera import CAMERA_FEATURES
from distvsd.score.optimizer import AdapterOptimizer
from distvsd.score.stored import ADAPTER_CONFIG_FILE, OPTIMIZER_FILE, network_files, place, refuse_unfit
from distvsd.vsd.process import Process, add_noise
from distvsd.vsd.samples import Samples, slices


class LoraScore:
    """eps_phi of Eq. 9 (arXiv 2305.16213), shared by all particles: a frozen network, a LoRA and a camera condition.

    base: the frozen network; its tensors are shared, never copied and never changed. text_of: particle ids [N] -> the
    network's condition, from the bare prompts. seed: of the adapter's initial values, equal on every rank.
    num_views: rows of a particle, which are adjacent. micro_batch: samples per network call in `eps` and `loss`, 0 =
    all. reads_cameras: where False, the network has no camera condition and cameras are ignored. Raises BackendError
    for a network to which no camera can be added. Nothing here communicates, unless a strategy has spread the network
    over ranks: then every call of the network is collective.

    local: the optimiser of whole parameters.
    """

    def __init__(
        self,
        *,
        base: Adaptable,
        text_of: Callable[[Tensor], Condition],
        config: ScoreConfig,
        seed: int,
        device: torch.device | str,
        num_views: int = 1,
        micro_batch: int = 0,
        reads_cameras: bool = True,
    ) -> None:
        self._base, self._text_of = base, text_of
        self._num_views, self._micro_batch = num_views, micro_batch
        self._peft, camera = adapted(base, config, seed, reads_cameras, device)
        self._denoiser = base.on(self._peft.get_base_model())
        self._adapter = adapter_parameters(self._peft)
        named = camera.named_parameters() if camera is not None else ()
        self._camera = {f"camera.{name}": parameter for name, parameter in named}
        self.trainable: dict[str, Parameter] = self._adapter | self._camera
        self._base_class = type(self.network)  # noted here because sharding replaces the class
        self.local = AdapterOptimizer(self.trainable, config)

    @property
    def process(self) -> Process:
        """See `Score.process`."""
        return self._base.process

    @property
    def num_parameters(self) -> tuple[int, int]:
        """Trained numbers in (adapter, camera condition)."""
        return sum(p.numel() for p in self._adapter.values()), sum(p.numel() for p in self._camera.values())

    @property
    def network(self) -> nn.Module:
        """The base's module with the LoRA layers and the camera condition in it."""
        return self._denoiser.module

    def without_adapter(self) -> Adaptable:
        """The base, computed by this network with its adapter off: for ranks that can hold only one module tree."""
        return self._base.on(AdapterOff(self._base, self._peft))

    @torch.no_grad()
    def eps(self, noisy: Tensor, times: Tensor, ids: Tensor, cameras: Tensor | None) -> Tensor:
        """See `Score.eps`. Without cameras the network gets zeros, as in training when the camera is dropped."""
        if cameras is None:
            cameras = noisy.new_zeros(len(noisy), CAMERA_FEATURES)
        outputs = [
            self._predict(noisy[rows], times[rows], ids[rows], cameras[rows])
            for rows in slices(len(noisy), self._micro_batch, self._num_views)
        ]
        return self.process.to_eps(torch.cat(outputs), noisy.float(), times)

    def loss(self, samples: Samples, times: Tensor, noise: Tensor, keep_camera: Tensor) -> Tensor:
        """See `Score.loss`. Eq. 7 in the prediction type of the base (for velocity, v = alpha eps - sigma x0).

        noise [N, C, h, w]; keep_camera [N] bool, False zeroes the camera. A masked sample's latents and camera are
        replaced by zeros, so that its loss is finite; the caller must give it no weight.
        """
        batches = slices(len(samples), self._micro_batch, self._num_views)
        losses = [self._loss(samples[b], times[b], noise[b], keep_camera[b]) for b in batches]
        return torch.cat(losses) if losses else noise.new_zeros(0, dtype=torch.float32)

    def gradients(
        self,
        samples: Samples,
        times: Tensor,
        noise: Tensor,
        keep_camera: Tensor,
        denominator: float,
        micro_batches: Sequence[slice],
    ) -> tuple[Iterator[Tensor], Tensor]:
        """One flat float32 gradient [G] for each micro-batch, and the detached losses of all samples, [N].

        A gradient is computed when the iterator reaches it, so that they are not all in memory. The losses of its rows
        are written then, and are complete when the iterator has ended.
        A micro-batch's gradient is that of sum_i weight_i loss_i / denominator over its rows, so their sum is the
        whole batch's. denominator: such as the global weight, equal on every rank. micro_batches: slices that cover the
        rows once, each one UNet call. A masked sample (weight 0) changes no bit, whatever it holds; its loss is 0.
        """
        losses = noise.new_zeros(len(samples), dtype=torch.float32)
        scale = self.loss_scale(samples.latents, denominator)

        def flat(rows: slice) -> Tensor:
            batch = samples[rows]
            if not len(batch):
                return noise.new_zeros(sum(self.num_parameters), dtype=torch.float32)
            factor = scale / denominator
            objective, losses[rows] = self.weighted_loss(batch, times[rows], noise[rows], keep_camera[rows], factor)
            gradients = torch.autograd.grad(objective, list(self.trainable.values()))
            return torch.cat([gradient.reshape(-1) for gradient in gradients]) / scale

        return map(flat, micro_batches), losses

    def weighted_loss(
        self, samples: Samples, times: Tensor, noise: Tensor, keep_camera: Tensor, factor: float
    ) -> tuple[Tensor, Tensor]:
        """sum_i weight_i loss_i * factor with its graph, in one UNet call, and the detached losses [N]; N > 0.

        A masked sample (weight 0) changes no bit, whatever it holds; its loss is 0.
        """
        loss = self._loss(samples, times, noise, keep_camera)
        valid = samples.weight > 0
        objective = torch.where(valid, samples.weight * loss, 0.0).sum() * factor
        return objective, torch.where(valid, loss.detach(), 0.0)

    def step(self, flat_gradient: Tensor, learning_rate: float) -> None:
        """One AdamW step with `flat_gradient` [G] float32, which is not changed; see `AdapterOptimizer.step`."""
        self.local.step(flat_gradient, learning_rate)

    def loss_scale(self, latents: Tensor, denominator: float) -> float:
        """A power of two that keeps float16 activations' gradients from rounding to zero: about what both means divide
        by."""
        if self._base.dtype != torch.float16:
            return 1.0
        return 2.0 ** round(math.log2(max(latents[0].numel() * denominator, 1.0))) if len(latents) else 1.0

    def state(self, optimizer: OptimizerState | None = None) -> dict[str, dict[str, Tensor]]:
        """Everything a bit-for-bit resume of the network needs: tensors by name by file name; copies, on the CPU.

        optimizer: holds the trained numbers, `local` by default; collective where ranks have parts of them.
        `score/adapter_model.safetensors` is what peft's save_pretrained writes.
        """
        optimizer = optimizer or self.local
        files: dict[str, dict[str, Tensor]] = {}
        for name, value in optimizer.values().items():
            file, stored_as = place(name)
            files.setdefault(file, {})[stored_as] = value
        steps = torch.tensor(optimizer.num_steps, dtype=torch.int64)
        files[OPTIMIZER_FILE] = {"num_steps": steps} | {
            f"{name}.{moment}": value
            for name, moments in optimizer.moments().items()
            for moment, value in moments.items()
        }
        return {file: {name: _snapshot(value) for name, value in tensors.items()} for file, tensors in files.items()}

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

    def load_state(self, files: Mapping[str, Mapping[str, Tensor]], optimizer: OptimizerState | None = None) -> None:
        """Inverse of `state`. Other tensors and files are ignored. Nothing changes when it raises CheckpointError."""
        shapes = {name: parameter.shape for name, parameter in self.trainable.items()}
        for file in network_files(shapes):
            refuse_unfit(file, shapes, files.get(file, {}))
        stored = files[OPTIMIZER_FILE]
        num_steps = int(stored["num_steps"])
        moments = {
            name: {moment: stored[f"{name}.{moment}"] for moment in ("step", "exp_avg", "exp_avg_sq")}
            for name in (shapes if num_steps else ())
        }
        places = {name: place(name) for name in shapes}
        values = {name: files[file][stored_as] for name, (file, stored_as) in places.items()}
        (optimizer or self.local).restore(values, moments, num_steps)

    def _loss(self, samples: Samples, times: Tensor, noise: Tensor, keep_camera: Tensor) -> Tensor:
        valid = samples.weight > 0
        latents = torch.where(valid[:, None, None, None], samples.latents.detach(), 0.0)
        cameras = torch.where((valid & keep_camera)[:, None], samples.cameras, 0.0)
        output = self._predict(add_noise(self.process, latents, noise, times), times, samples.ids, cameras)
        return (output - self.process.target(latents, noise, times)).square().flatten(1).mean(1)

    def _predict(self, noisy: Tensor, times: Tensor, ids: Tensor, cameras: Tensor) -> Tensor:
        condition = replace(
            self._text_of(ids), cameras=cameras if self._camera else None, views_per_particle=self._num_views
        )
        return self._denoiser.predict(noisy, times, condition)


def _snapshot(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True).contiguous()
