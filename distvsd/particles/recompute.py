"""Activation checkpointing: what a render keeps for its backward pass is computed again instead of kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")


def checkpointed(function: Callable[..., Result]) -> Callable[..., Result]:
    """The same function, bit for bit in values and gradients; keeps its arguments and no intermediate tensors.

    The function must not draw from torch's global random state: that is not restored for the second computation.
    """
    return functools.partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
