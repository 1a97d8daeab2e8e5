"""Builds the strategy that `parallel.strategy` names; its libraries are imported only where it is chosen."""

from __future__ import annotations

import inspect
from importlib.util import find_spec

from distvsd.config import ParallelConfig
from distvsd.errors import BackendError
from distvsd.parallel.world import World
from distvsd.score.base import Strategy
from distvsd.score.lora import LoraScore
from distvsd.score.strategies.flat import Flat


def refuse_missing(options: ParallelConfig) -> None:
    """Raises BackendError where the strategy's library is missing; the same on every rank, before anything is loaded.

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


def spreads_network(options: ParallelConfig, world: World) -> bool:
    """Whether ranks hold parts of the frozen network, so that every call of it is collective."""
    whole = options.strategy in ("flat", "ddp") or (options.strategy == "deepspeed" and options.zero_stage < 3)
    return world.size > 1 and not whole


def choose(options: ParallelConfig, world: World, score: LoraScore, flat: Flat) -> Strategy:
    """The strategy of the configuration; `flat` for a single rank.

    Does not communicate; the strategy does so from `begin` on.
    """
    if world.size == 1:
        return flat
    match options.strategy:
        case "flat":
            return flat
        case "ddp":
            from distvsd.score.strategies.ddp import Ddp

            return Ddp(world, score.local)
        case "fsdp2":
            from distvsd.score.strategies.fsdp2 import Fsdp2

            return Fsdp2(world, score.network, score.local, flat)
        case "deepspeed":
            from distvsd.score.strategies.deepspeed import DeepSpeed

            return DeepSpeed(world, options, score.network, score.local)
    raise ValueError(f"parallel.strategy is {options.strategy!r}; known are flat, ddp, fsdp2 and deepspeed")
