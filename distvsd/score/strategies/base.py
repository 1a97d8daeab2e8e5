"""What strategies have in common: what they are given, what they give back, and how they say that a rank is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from distvsd.parallel.collectives import all_reduce_sum_, meet, talking
from distvsd.parallel.world import World


class Work(Protocol):
    """One rank's part of a step, not computed yet. It has at least one row, of weight 0 where the rank has none."""

    @property
    def scale(self) -> float:
        """What the objective is to be multiplied by in the backward pass, against float16's rounding to zero."""
        ...

    def gradients(self) -> tuple[Iterator[Tensor], Tensor]:
        """A flat gradient `[G]` float32 for each micro-batch, whose sum over all ranks is the step's; row losses."""
        ...

    def objective(self, factor: float) -> tuple[Tensor, Tensor]:
        """`factor` times this rank's part of the loss, a scalar with its graph, in one call; row losses `[N]`."""
        ...


@dataclass(frozen=True)
class Taken:
    """What became of a step, the same on every rank but for rows and sound: see `score.base.Taken`."""

    usable: bool
    loss: float
    rows: Tensor
    sound: bool | None


class Held(Protocol):
    """The trained numbers and AdamW's moments, wherever they are: see `score.base.Optimizer`."""

    @property
    def num_steps(self) -> int: ...
    def values(self) -> Mapping[str, Tensor]: ...
    def moments(self) -> Mapping[str, Mapping[str, Tensor]]: ...
    def restore(
        self, values: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]], num_steps: int
    ) -> None: ...


class Local(Held, Protocol):
    """The optimiser of one rank that holds everything: `score.optimizer.AdapterOptimizer`."""

    trainable: Mapping[str, Parameter]
    max_grad_norm: float
    num_steps: int
    new_adamw: Callable[[Iterable[Tensor]], torch.optim.AdamW]

    def rate(self, learning_rate: float) -> float: ...
    def step(self, flat_gradient: Tensor, learning_rate: float) -> None: ...
    def release(self) -> Mapping[str, Mapping[str, Tensor]]: ...


class Trained(nn.Module):
    """Only what is trained, for a wrapper that would otherwise broadcast, cast or cut up the frozen network too.

    Called with work and a factor, it gives the work's objective.
    """

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        super().__init__()
        self.trained = nn.ParameterList(parameters.values())

    def forward(self, work: Work, factor: float) -> tuple[Tensor, Tensor]:
        return work.objective(factor)


def total_loss(world: World, rows: Tensor) -> float:
    """The sum of the row losses of all ranks; not finite where one of them is not. One small collective."""
    return float(all_reduce_sum_(world, rows.double().sum()[None]))


@contextmanager
def together(world: World) -> Iterator[None]:
    """For a block in which a library communicates: all hosts meet before it, and a lost rank is a RankError in it."""
    what = "a step of the score network"
    meet(world, world.device, what)
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise  # no memory, a wrong shape: this rank's own
        with talking(world, what):
            raise


def flat(parameters: Mapping[str, Parameter]) -> Tensor:
    """The gradients that lie at the parameters as one vector `[G]`; they are taken away."""
    parts = []
    for parameter in parameters.values():
        gradient = parameter.grad
        assert gradient is not None, "every trained parameter takes part in the objective"
        parts.append(gradient.reshape(-1))
        parameter.grad = None
    return torch.cat(parts)
