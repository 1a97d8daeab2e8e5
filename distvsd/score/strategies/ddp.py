"""torch's DistributedDataParallel: gradients are reduced in buckets while the backward pass still runs."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property

import torch
from torch.nn.parallel import DistributedDataParallel

from distvsd.faults import fault, poison
from distvsd.parallel.world import World
from distvsd.score.base import StepResult
from distvsd.score.optimizer import AdapterOptimizer
from distvsd.score.strategies.base import Trained, flat, together, total_loss
from distvsd.score.work import Work


class Ddp:
    """DistributedDataParallel around what is trained; each rank has its own frozen network, which is not broadcast."""

    def __init__(self, world: World, local: AdapterOptimizer) -> None:
        self._world = world
        self._local = local

    @property
    def optimizer(self) -> AdapterOptimizer:
        """See `score.base.Strategy`."""
        return self._local

    def begin(self) -> None:
        """On the first call, compares and broadcasts what is trained. Collective then."""
        _ = self._wrapped

    def calling(self) -> AbstractContextManager[None]:
        """See `score.base.Strategy`. Network calls are local."""
        return nullcontext()

    def step(self, work: Work, learning_rate: float) -> StepResult:
        """See `score.base.Strategy`. A value that is not finite shows in the sum, which is checked before the step."""
        world, scale = self._world, work.scale
        self.begin()
        fault("reduce")
        with together(world):
            # DDP averages over ranks, but the ranks' parts must be summed.
            objective, rows = self._wrapped(work, scale * world.size)
            poison("reduce", objective[None]).sum().backward()
            gradient = flat(self._local.trainable) / scale
            loss = total_loss(world, rows)
        # The reduced gradient has the same bits on every rank, so all ranks decide the same.
        usable = math.isfinite(loss) and bool(gradient.isfinite().all())
        if usable:
            self._local.step(gradient, learning_rate)
        return StepResult(usable, loss, rows, None)

    @cached_property
    def _wrapped(self) -> torch.nn.Module:
        with together(self._world):
            return DistributedDataParallel(Trained(self._local.trainable), broadcast_buffers=False)
