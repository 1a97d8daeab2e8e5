"""torch's fully_shard: each rank keeps a part of the frozen network and gathers a block when it is called."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import nn

from distvsd.parallel.world import World
from distvsd.score.base import StepResult
from distvsd.score.optimizer import AdapterOptimizer
from distvsd.score.strategies.base import together
from distvsd.score.strategies.flat import Flat
from distvsd.score.work import Work


class Fsdp2:
    """The frozen network is sharded; what is trained is whole on every rank and reduced as in `flat`.

    The adapter is a thousandth of the network: sharding it too would save nothing and change the order of its sum.
    Nothing frozen has a gradient, so no gradient is scattered. Gathered parameters have the same bits but other
    addresses, so that a kernel may round differently: results differ from those of `flat` by 1e-7, not 0.
    network: its blocks are gathered one at a time; every call of it is collective once `begin` was called.
    """

    def __init__(self, world: World, network: nn.Module, local: AdapterOptimizer, flat: Flat) -> None:
        self._world = world
        self._network = network
        self._local = local
        self._flat = flat
        self._is_spread = False

    @property
    def optimizer(self) -> AdapterOptimizer:
        """See `score.base.Strategy`."""
        return self._local

    def begin(self) -> None:
        """On the first call, shards the network. Every rank has loaded the same one, so no parameter is sent.

        A network in the host's memory is moved to the device block by block, and only this rank's parts stay there.
        """
        if self._is_spread:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        with together(self._world):
            mesh = init_device_mesh(self._world.device.type, (self._world.size,))
            whole = set(self._local.trainable.values())
            for module in [*_blocks(self._network), self._network]:
                fully_shard(module, mesh=mesh, ignored_params=whole)
        self._is_spread = True

    def calling(self) -> AbstractContextManager[None]:
        """See `score.base.Strategy`. Network calls are collective."""
        return together(self._world)

    def step(self, work: Work, learning_rate: float) -> StepResult:
        """See `score.base.Strategy`."""
        self.begin()
        with together(self._world):
            return self._flat.step(work, learning_rate)


def _blocks(network: nn.Module) -> list[nn.Module]:
    """What diffusers itself keeps on one device (resnets, transformer blocks), children before parents."""
    names = getattr(network, "_no_split_modules", None) or []
    return [module for module in reversed(list(network.modules())) if type(module).__name__ in names]
