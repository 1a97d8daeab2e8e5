"""From `parallel.strategy` to an object: the libraries of a strategy are imported only where it is asked for."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import Literal, Protocol

from torch import nn

from distvsd.errors import BackendError
from distvsd.parallel.world import World
from distvsd.score.strategies.base import Held, Local, Taken, Work
from distvsd.score.strategies.flat import Flat


class Options(Protocol):
    """What is read of the configuration's `parallel` block; meanings and ranges are documented there."""

    @property
    def strategy(self) -> Literal["flat", "ddp", "fsdp2", "deepspeed"]: ...
    @property
    def zero_stage(self) -> int: ...
    @property
    def timeout_s(self) -> float: ...


class Strategy(Protocol):
    """See `score.base.Strategy`."""

    def begin(self) -> None: ...
    def calling(self) -> AbstractContextManager[None]: ...
    def step(self, work: Work, learning_rate: float) -> Taken: ...


def refuse_missing(options: Options) -> None:
    """Raises BackendError where a strategy's library is not there; on every rank the same, before anything is loaded.

    Does not import deepspeed, which takes seconds.
    """
    if options.strategy == "deepspeed" and find_spec("deepspeed") is None:
        raise BackendError(
            "parallel.strategy is deepspeed, but there is no package deepspeed; install it "
            "(pip install 'distvsd[deepspeed]'), or set parallel.strategy=flat, which gives the same adapter"
        )
    if options.strategy == "fsdp2":
        import torch
        from torch.distributed.fsdp import fully_shard

        if "ignored_params" not in inspect.signature(fully_shard).parameters:
            raise BackendError(
                f"parallel.strategy is fsdp2, but torch {torch.__version__} cannot leave parameters out of it; install "
                "a newer torch, or set parallel.strategy=flat, which gives the same adapter"
            )


def spreads_network(options: Options, world: World) -> bool:
    """Whether ranks hold parts of the frozen network, so that every call of it is every rank's."""
    whole = options.strategy in ("flat", "ddp") or (options.strategy == "deepspeed" and options.zero_stage < 3)
    return world.size > 1 and not whole


def choose(options: Options, world: World, network: nn.Module, local: Local, flat: Flat) -> tuple[Strategy, Held]:
    """The strategy, and who holds the trained numbers under it. A rank on its own has nobody to share with: `flat`.

    Does not communicate; the strategy does so from `begin` on.
    """
    if world.size == 1:
        return flat, local
    match options.strategy:
        case "flat":
            return flat, local
        case "ddp":
            from distvsd.score.strategies.ddp import Ddp

            return Ddp(world, local), local
        case "fsdp2":
            from distvsd.score.strategies.fsdp2 import Fsdp2

            return Fsdp2(world, network, local, flat), local
        case "deepspeed":
            from distvsd.score.strategies.deepspeed import DeepSpeed

            engine = DeepSpeed(world, options.zero_stage, network, local, options.timeout_s)
            return engine, engine
    raise ValueError(f"parallel.strategy is {options.strategy!r}; known are flat, ddp, fsdp2 and deepspeed")
