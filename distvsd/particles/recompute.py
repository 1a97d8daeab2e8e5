"""Memory for time: what a render keeps for its backward pass is thrown away and computed again when that comes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")


def forgetful(function: Callable[..., Result]) -> Callable[..., Result]:
    """The same function, bit for bit in values and gradients, that keeps its arguments and no intermediate tensors.

    The function must not draw from torch's global random state; everything of the house draws from keyed streams.
    """
    return functools.partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
