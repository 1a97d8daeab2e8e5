"""What the loop needs of a score network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor
from torch.nn import Parameter

from distvsd.vsd.samples import Samples


class Score(Protocol):
    """A network that estimates the score of the rendered images' distribution (eps_phi of Eq. 9, arXiv 2305.16213).

    Every rank holds a replica, and no method communicates, unless a strategy has spread the network over ranks.
    Replicas stay equal because every rank calls `step` with the same gradient.
    """

    @property
    def num_timesteps(self) -> int:
        """T: timesteps are integers in [0, T)."""
        ...

    @property
    def trainable(self) -> Mapping[str, Parameter]:
        """Every parameter that is trained, float32, by the name it is saved under, in the order of a flat gradient."""
        ...

    def eps(self, noisy: Tensor, timesteps: Tensor, ids: Tensor, cameras: Tensor | None) -> Tensor:
        """The noise in `noisy` [N, C, h, w], float32, without a graph; ids [N] particle ids, timesteps [N] int64.

        cameras: [N, 16] flattened camera-to-world matrices; None asks for the estimate without a camera (ESD).
        """
        ...

    def loss(self, samples: Samples, timesteps: Tensor, noise: Tensor, keep_camera: Tensor) -> Tensor:
        """Denoising loss of each sample, [N] float32, a mean over latent elements; differentiable in `trainable`."""
        ...

    def gradients(
        self,
        samples: Samples,
        timesteps: Tensor,
        noise: Tensor,
        keep_camera: Tensor,
        denominator: float,
        micro_batches: Sequence[slice],
    ) -> tuple[Iterator[Tensor], Tensor]:
        """One flat gradient [G] of sum(weight * loss) / denominator for each micro-batch, and the losses [N].

        A gradient is computed when it is asked for, and the losses of its rows are written then.
        """
        ...

    def step(self, flat_gradient: Tensor, learning_rate: float) -> None:
        """One optimiser step with a flat gradient [G] float32, in the order of `trainable`."""
        ...

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Everything a bit-for-bit resume needs: tensors by name by relative file name; copies, on the CPU."""
        ...

    def texts(self) -> dict[str, str]:
        """The text files that belong next to `state`, by relative file name."""
        ...

    def load_state(self, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Inverse of `state`; raises CheckpointError when a file or tensor is missing or has another shape."""
        ...


class Optimizer(Protocol):
    """Who has the trained numbers and AdamW's moments: one rank all of them, or every rank its part."""

    @property
    def num_steps(self) -> int:
        """Steps taken since the run began, across resumes."""
        ...

    def values(self) -> Mapping[str, Tensor]:
        """Every trained tensor, whole, by name; collective where ranks have parts."""
        ...

    def moments(self) -> Mapping[str, Mapping[str, Tensor]]:
        """`step`, `exp_avg`, `exp_avg_sq` of each, whole; nothing before the first step. Collective like `values`."""
        ...

    def restore(
        self, values: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]], num_steps: int
    ) -> None:
        """Inverse of the three above; before the first step of this process. Does not communicate."""
        ...


class Taken(Protocol):
    """What became of one step. usable: False where all ranks left it out together, because something was not finite.

    loss: sum of the row losses of all ranks. rows: this rank's losses `[N]`. sound: whether this rank's gradient was
    finite, None where only the sum over ranks is known.
    """

    @property
    def usable(self) -> bool: ...
    @property
    def loss(self) -> float: ...
    @property
    def rows(self) -> Tensor: ...
    @property
    def sound(self) -> bool | None: ...


class Strategy(Protocol):
    """How ranks make one step together, and who holds what. Every rank calls all of it, the same number of times."""

    def begin(self) -> None:
        """Spreads over ranks what is to be spread; before the first call of a network, again does nothing."""
        ...

    def calling(self) -> AbstractContextManager[None]:
        """For a block that calls a network outside a step; where it is spread, a lost rank is a RankError there."""
        ...

    def step(self, work: Any, learning_rate: float) -> Taken:
        """One optimiser step with what every rank's `score.work.Work` adds up to. Collective."""
        ...
