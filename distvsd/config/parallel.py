"""How ranks work together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from distvsd.config.ranges import Range


@dataclass(frozen=True)
class ParallelConfig:
    """How ranks work together."""

    strategy: Literal["flat", "ddp", "fsdp2", "deepspeed"] = "flat"
    """How ranks train the score network (same adapter up to rounding); flat: one reduction a step, nothing split.
    Stages that train no score network take flat."""
    zero_stage: Annotated[int, Range(1, 3)] = 1
    """deepspeed only: what is split between ranks. 1: the optimiser; 2: the gradient too; 3: the frozen network too."""
    exchange: Literal["auto", "none", "all_to_all", "all_gather"] = "auto"
    """Which renders travel to train the score network; the adapter is the same. none: no render, a rank trains on its
    own; all_to_all: those above an equal share, to ranks that have fewer; all_gather: every render to every rank. auto:
    the first of them, in equal shares, that sends the least; `distvsd plan` says which."""
    numerics: Literal["fast", "exact"] = "fast"
    """exact: bit for bit the same particles on any number of ranks, slower."""
    timeout_s: Annotated[float, Range(0, 86400, above=True)] = 120.0
    """Seconds after which a rank that does not answer is an error."""
