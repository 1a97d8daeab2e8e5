"""A flow model made from a diffusion model by an exact change of variables, to test flow priors without new weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from distvsd.networks.base import Adaptable, Condition, LatentSpace
from distvsd.vsd.process import Diffusion, Flow, Process


@dataclass(frozen=True, kw_only=True)
class TabledFlow(Flow):
    """Rectified flow whose times are those of a diffusion: step t is s = sigma_t / (alpha_t + sigma_t).

    diffusion: times are drawn from it, so that the same uniform numbers give the same noise levels.
    """

    diffusion: Diffusion

    @cached_property
    def table(self) -> Tensor:
        """The flow times of all steps, `[T]`, increasing."""
        steps = torch.arange(len(self.diffusion.alphas_cumprod), device=self.diffusion.alphas_cumprod.device)
        alpha, sigma = self.diffusion.alpha_sigma(steps)
        return sigma / (alpha + sigma)

    def times(self, uniform: Tensor, low: float, high: float) -> Tensor:
        """See `Process.times`."""
        return self.table[self.diffusion.times(uniform, low, high)]

    def step_of(self, t: Tensor) -> Tensor:
        """The diffusion's step nearest to flow times `[N]`, int64."""
        table = self.table
        right = torch.searchsorted(table, t.contiguous()).clamp(1, len(table) - 1)
        return torch.where(t - table[right - 1] < table[right] - t, right - 1, right)


@dataclass(frozen=True)
class AsFlow:
    """See `as_flow`. inner: the diffusion denoiser."""

    inner: Adaptable
    process: TabledFlow

    @property
    def space(self) -> LatentSpace:
        return self.inner.space

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    @property
    def module(self) -> nn.Module:
        return self.inner.module

    @property
    def lora_targets(self) -> Sequence[str]:
        return self.inner.lora_targets

    def predict(self, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """v = eps - x_0, from what the diffusion model predicts for x_t = (alpha + sigma) x_s."""
        diffusion: Process = self.inner.process
        step = self.process.step_of(t)
        alpha, sigma = diffusion.alpha_sigma(step)
        scaled = (alpha + sigma).reshape(-1, *[1] * (noisy.ndim - 1)) * noisy
        output = self.inner.predict(scaled, step, condition)
        return diffusion.to_eps(output, scaled, step) - diffusion.to_x0(output, scaled, step)

    def on(self, module: nn.Module) -> AsFlow:
        return replace(self, inner=self.inner.on(module))

    def camera_width(self) -> int:
        return self.inner.camera_width()

    def add_camera(self, module: nn.Module, embedding: nn.Module | None) -> nn.Module | None:
        return self.inner.add_camera(module, embedding)


def as_flow(denoiser: Adaptable) -> AsFlow:
    """The same model as a rectified flow: x_s = x_t / (alpha + sigma) at s = sigma / (alpha + sigma), v = eps - x_0.

    Its eps and its w(t) are the diffusion model's. The score network's loss is 1 / (1 - s)^2 times the loss in eps.
    Raises ValueError for a denoiser that was not trained on diffusion.
    """
    process = denoiser.process
    if not isinstance(process, Diffusion):
        raise ValueError(f"the denoiser's process is a {type(process).__name__}; as_flow needs a Diffusion")
    return AsFlow(denoiser, TabledFlow(diffusion=process))
