"""The default: every rank holds everything and one flat reduction adds the gradients up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from distvsd.score.strategies.base import Taken, Work


class Reduced(Protocol):
    """What a reduction gives back: see `parallel.reduce.Reduced`."""

    @property
    def gradient(self) -> Tensor: ...
    @property
    def sums(self) -> Tensor: ...
    @property
    def usable(self) -> bool: ...


Reduce = Callable[[Iterable[Tensor], Tensor], Reduced]
"""(gradients of this rank's micro-batches, rows to sum, read after the gradients) -> Reduced. Collective."""


@dataclass(frozen=True)
class Flat:
    """reduce: the collective sum. move(gradient, learning rate): the optimiser's step, the same on every rank."""

    reduce: Reduce
    move: Callable[[Tensor, float], None]

    def begin(self) -> None:
        """Nothing is spread."""

    def calling(self) -> AbstractContextManager[None]:
        """See `score.base.Strategy`: every rank's own."""
        return nullcontext()

    def step(self, work: Work, learning_rate: float) -> Taken:
        """See `score.base.Strategy`. Looks at the gradient before it is used; one collective."""
        vectors, rows = work.gradients()
        reduced = self.reduce(vectors, rows[:, None])
        if reduced.usable:
            self.move(reduced.gradient, learning_rate)
            return Taken(True, float(reduced.sums[0]), rows, True)
        sound = all(bool(vector.isfinite().all()) for vector in work.gradients()[0])  # computed again: it is rare
        return Taken(False, float(reduced.sums[0]), rows, sound)
