"""AdamW for the trained parameters: a linear warm-up, gradient clipping, and its state, by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from distvsd.config import ScoreConfig


class AdapterOptimizer:
    """AdamW of one rank on whole parameters, in the order of a flat gradient; nothing here communicates.

    config: AdamW's settings, the warm-up, and the norm to which longer gradients are scaled down.
    num_steps: taken since the run began, across resumes; the warm-up counts by it.
    """

    def __init__(
        self,
        trainable: Mapping[str, Parameter],
        config: ScoreConfig,
    ) -> None:
        self.trainable = trainable
        self.max_grad_norm = config.max_grad_norm
        self.num_steps = 0
        self._warmup = config.warmup
        # torch's AdamW with these settings, also for a strategy that takes the parameters over.
        self.new_adamw: Callable[[Iterable[Tensor]], torch.optim.AdamW] = functools.partial(
            torch.optim.AdamW, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
        )
        self._adamw = self.new_adamw(trainable.values())

    def rate(self, learning_rate: float) -> float:
        """The rate of the next step: `learning_rate` times (steps taken + 1) / warmup, and at most `learning_rate`."""
        return learning_rate * min(1.0, (self.num_steps + 1) / max(self._warmup, 1))

    def step(self, flat_gradient: Tensor, learning_rate: float) -> None:
        """One step with `flat_gradient` [G] float32, which is not changed."""
        if self.max_grad_norm > 0:
            norm = flat_gradient.norm()
            flat_gradient = flat_gradient * (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        sizes = [parameter.numel() for parameter in self.trainable.values()]
        for parameter, part in zip(self.trainable.values(), torch.split(flat_gradient, sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        self._adamw.param_groups[0]["lr"] = self.rate(learning_rate)
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        self.num_steps += 1

    def values(self) -> Mapping[str, Tensor]:
        """The parameters themselves."""
        return self.trainable

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """`step`, `exp_avg`, `exp_avg_sq` of every parameter, not copied; empty before the first step."""
        if not self.num_steps:
            return {}
        return {name: self._adamw.state[parameter] for name, parameter in self.trainable.items()}

    def release(self) -> dict[str, dict[str, Tensor]]:
        """Returns the moments and forgets them here: the caller keeps them from now on."""
        moments = self.moments()
        self._adamw.state.clear()
        return moments

    @torch.no_grad()
    def restore(
        self, values: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]], num_steps: int
    ) -> None:
        """Inverse of `values`, `moments` and `num_steps`; copies."""
        for name, parameter in self.trainable.items():
            parameter.copy_(values[name])
        self._adamw.state.clear()
        for name, stored in moments.items():
            device = self.trainable[name].device
            # AdamW keeps its own step on the CPU, so that its bias correction does not wait for the device.
            self._adamw.state[self.trainable[name]] = {
                key: value.to("cpu" if key == "step" else device, copy=True) for key, value in stored.items()
            }
        self.num_steps = num_steps
