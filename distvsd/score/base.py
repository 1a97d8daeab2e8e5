"""The interfaces of a score network, its optimiser's state, and the strategy by which ranks train it together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor
from torch.nn import Parameter

from distvsd.vsd.process import Process
from distvsd.vsd.samples import Samples

if TYPE_CHECKING:
    from distvsd.score.work import Work


class Score(Protocol):
    """A network that estimates the score of the rendered images' distribution (eps_phi of Eq. 9, arXiv 2305.16213).

    Every rank holds a replica, and no method communicates, unless a strategy has spread the network over ranks.
    Replicas stay equal because every rank calls `step` with the same gradient.
    """

    @property
    def process(self) -> Process:
        """The forward process of its base."""
        ...

    @property
    def trainable(self) -> Mapping[str, Parameter]:
        """Every parameter that is trained, float32, by the name it is saved under, in the order of a flat gradient."""
        ...

    def eps(self, noisy: Tensor, times: Tensor, ids: Tensor, cameras: Tensor | None) -> Tensor:
        """The noise in `noisy` [N, C, h, w], float32, without a graph; ids [N] particle ids, times [N] of `process`.

        cameras: [N, 16] flattened camera-to-world matrices; None asks for the estimate without a camera (ESD).
        """
        ...

    def loss(self, samples: Samples, times: Tensor, noise: Tensor, keep_camera: Tensor) -> Tensor:
        """Denoising loss of each sample, [N] float32, a mean over latent elements; differentiable in `trainable`."""
        ...

    def gradients(
        self,
        samples: Samples,
        times: Tensor,
        noise: Tensor,
        keep_camera: Tensor,
        denominator: float,
        micro_batches: Sequence[slice],
    ) -> tuple[Iterator[Tensor], Tensor]:
        """One flat gradient [G] of sum(weight * loss) / denominator for each micro-batch, and the losses [N].

        A gradient is computed when the iterator reaches it, and the losses of its rows are written then.
        """
        ...

    def step(self, flat_gradient: Tensor, learning_rate: float) -> None:
        """One optimiser step with a flat gradient [G] float32, in the order of `trainable`."""
        ...


class OptimizerState(Protocol):
    """The trained numbers and AdamW's moments, wherever they are: whole on every rank, or a part on each."""

    @property
    def num_steps(self) -> int:
        """Steps taken since the run began, across resumes."""
        ...

    def values(self) -> Mapping[str, Tensor]:
        """Every trained tensor, whole, by name; collective where ranks have parts."""
        ...

    def moments(self) -> Mapping[str, Mapping[str, Tensor]]:
        """`step`, `exp_avg`, `exp_avg_sq` of each, whole; empty before the first step. Collective like `values`."""
        ...

    def restore(
        self, values: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]], num_steps: int
    ) -> None:
        """Inverse of the three above; before the first step of this process. Does not communicate."""
        ...


@dataclass(frozen=True)
class StepResult:
    """The outcome of one step, the same on every rank except for `rows` and `finite`.

    taken: False where all ranks left the step out together, because something was not finite. loss: sum of the row
    losses of all ranks. rows: this rank's losses `[N]`. finite: whether this rank's gradient was finite, None where
    only the sum over ranks is known.
    """

    taken: bool
    loss: float
    rows: Tensor
    finite: bool | None


class Strategy(Protocol):
    """How ranks take one step together, and which rank holds what. Every rank must call each method equally often."""

    @property
    def optimizer(self) -> OptimizerState:
        """Holds the trained numbers."""
        ...

    def begin(self) -> None:
        """Spreads state over ranks where needed; call it before the first network call. Later calls do nothing."""
        ...

    def calling(self) -> AbstractContextManager[None]:
        """For a block that calls a network outside a step. Where it is spread, a lost rank raises RankError there."""
        ...

    def step(self, work: Work, learning_rate: float) -> StepResult:
        """One optimiser step with the sum of all ranks' `work`. Collective."""
        ...
