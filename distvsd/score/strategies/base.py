"""What strategies have in common: a module of what is trained, the total loss, and how a lost rank becomes an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from distvsd.parallel.collectives import all_reduce_sum_, meet, talking
from distvsd.parallel.world import World
from distvsd.score.work import Work


class Trained(nn.Module):
    """Only what is trained, for a wrapper that would otherwise broadcast, cast or partition the frozen network too.

    Called with work and a factor, it returns the work's objective.
    """

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        super().__init__()
        self.trained = nn.ParameterList(parameters.values())

    def forward(self, work: Work, factor: float) -> tuple[Tensor, Tensor]:
        return work.weighted_loss(factor)


def total_loss(world: World, rows: Tensor) -> float:
    """The sum of the row losses of all ranks; not finite where one of them is not. One small collective."""
    return float(all_reduce_sum_(world, rows.double().sum()[None]))


@contextmanager
def together(world: World) -> Iterator[None]:
    """For a block in which a library communicates: all hosts meet before it, and a lost rank raises RankError in it."""
    what = "a step of the score network"
    meet(world, world.device, what)
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise  # out of memory, a wrong shape: this rank's own error
        with talking(world, what):
            raise


def flat(parameters: Mapping[str, Parameter]) -> Tensor:
    """The parameters' gradients as one vector `[G]`; every `.grad` is set to None."""
    parts = []
    for parameter in parameters.values():
        gradient = parameter.grad
        assert gradient is not None, "every trained parameter takes part in the objective"
        parts.append(gradient.reshape(-1))
        parameter.grad = None
    return torch.cat(parts)
