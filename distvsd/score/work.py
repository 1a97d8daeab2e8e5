"""What one rank computes in one step of the score network; a strategy sums it over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from distvsd.score.lora import LoraScore
from distvsd.vsd.samples import Samples


@dataclass(frozen=True)
class Batch:
    """What one rank trains on in one step: its rows, with a time, noise and whether the camera is kept for each."""

    samples: Samples
    times: Tensor
    noise: Tensor
    keep_camera: Tensor

    def never_empty(self, num_views: int) -> Batch:
        """This batch, or one particle of weight 0 where it has no rows. No sum changes, and the rank runs what the
        others run."""
        if len(self.samples):
            return self
        samples = Samples(*(_zeros(getattr(self.samples, field.name), num_views) for field in fields(Samples)))
        columns = (_zeros(column, num_views) for column in (self.times, self.noise, self.keep_camera))
        return Batch(samples, *columns)


def _zeros(column: Tensor, rows: int) -> Tensor:
    return torch.zeros(rows, *column.shape[1:], dtype=column.dtype, device=column.device)


@dataclass(frozen=True)
class Work:
    """One rank's part of a step; at least one row. denominator: the global weight, the same on every rank.

    micro_batches: slices that cover the rows once, each one network call of `gradients`; `weighted_loss` makes one
    call.
    """

    score: LoraScore
    batch: Batch
    denominator: float
    micro_batches: list[slice]

    @property
    def scale(self) -> float:
        """A power of two, the same on every rank, that keeps the gradients of float16 activations from rounding to
        zero."""
        return self.score.loss_scale(self.batch.samples.latents, self.denominator)

    def gradients(self) -> tuple[Iterator[Tensor], Tensor]:
        """See `LoraScore.gradients`: a flat gradient `[G]` per micro-batch, and the losses `[N]`, whole at the end."""
        return self.score.gradients(*self._columns(), self.denominator, self.micro_batches)

    def weighted_loss(self, factor: float) -> tuple[Tensor, Tensor]:
        """`factor` times this rank's part of the mean loss, a scalar with its graph; and the detached losses `[N]`."""
        return self.score.weighted_loss(*self._columns(), factor / self.denominator)

    def _columns(self) -> tuple[Samples, Tensor, Tensor, Tensor]:
        return self.batch.samples, self.batch.times, self.batch.noise, self.batch.keep_camera
