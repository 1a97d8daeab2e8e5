"""What one rank has to compute in one step of the score network, before anyone has said how ranks add it up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from distvsd.score.lora import LoraScore
from distvsd.vsd.samples import Samples


@dataclass(frozen=True)
class Draws:
    """What one rank trains on in one step: its rows of the batch, with a time, noise and a kept camera for each."""

    samples: Samples
    timesteps: Tensor
    noise: Tensor
    keep_camera: Tensor

    def never_empty(self) -> Draws:
        """With one row of weight 0 where there is none: it changes no sum, and the rank runs what all others run."""
        if len(self.samples):
            return self
        samples = Samples(*(_one_row(getattr(self.samples, field.name)) for field in fields(Samples)))
        return Draws(samples, _one_row(self.timesteps), _one_row(self.noise), _one_row(self.keep_camera))


def _one_row(column: Tensor) -> Tensor:
    return torch.zeros(1, *column.shape[1:], dtype=column.dtype, device=column.device)


@dataclass(frozen=True)
class Work:
    """One rank's part of a step; at least one row. denominator: the global weight, the same on every rank.

    micro_batches: slices that cover the rows once, each one UNet call of `gradients`; `objective` makes one call.
    """

    score: LoraScore
    draws: Draws
    denominator: float
    micro_batches: list[slice]

    @property
    def scale(self) -> float:
        """A power of two, the same on every rank, that keeps the gradients of float16 activations from rounding to
        zero."""
        return self.score.loss_scale(self.draws.samples.latents, self.denominator)

    def gradients(self) -> tuple[Iterator[Tensor], Tensor]:
        """See `LoraScore.gradients`: a flat gradient `[G]` a micro-batch, and the losses `[N]`, whole at its end."""
        return self.score.gradients(*self._columns(), self.denominator, self.micro_batches)

    def objective(self, factor: float) -> tuple[Tensor, Tensor]:
        """`factor` times this rank's part of the mean loss, a scalar with its graph; and the detached losses `[N]`."""
        return self.score.objective(*self._columns(), factor / self.denominator)

    def _columns(self) -> tuple[Samples, Tensor, Tensor, Tensor]:
        return self.draws.samples, self.draws.timesteps, self.draws.noise, self.draws.keep_camera
