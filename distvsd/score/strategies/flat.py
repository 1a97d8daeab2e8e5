"""The default: every rank holds everything, and one reduction of a flat vector sums the gradients."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from distvsd.parallel.reduce import Reduced
from distvsd.score.base import StepResult
from distvsd.score.optimizer import AdapterOptimizer
from distvsd.score.work import Work


class Reduce(Protocol):
    """`parallel.reduce.reduce_gradients` with its world, length and numerics. Collective."""

    def __call__(self, vectors: Iterable[Tensor], *, extra_sums: Tensor) -> Reduced: ...


@dataclass(frozen=True)
class Flat:
    """reduce: the collective sum. optimizer: takes the step, the same on every rank."""

    reduce: Reduce
    optimizer: AdapterOptimizer

    def begin(self) -> None:
        """Nothing is spread."""

    def calling(self) -> AbstractContextManager[None]:
        """See `score.base.Strategy`. Network calls are local."""
        return nullcontext()

    def step(self, work: Work, learning_rate: float) -> StepResult:
        """See `score.base.Strategy`. The gradient is checked before it is used; one collective."""
        vectors, rows = work.gradients()
        reduced = self.reduce(vectors, extra_sums=rows[:, None])
        if reduced.usable:
            self.optimizer.step(reduced.gradient, learning_rate)
            return StepResult(True, float(reduced.sums[0]), rows, True)
        finite = all(bool(vector.isfinite().all()) for vector in work.gradients()[0])  # computed again: it is rare
        return StepResult(False, float(reduced.sums[0]), rows, finite)
