"""Who owns which particle: a function of the counts alone, so that every rank knows the whole answer."""

from __future__ import annotations

from itertools import pairwise


def shares(total: int, parts: int) -> list[range]:
    """Cuts `range(total)` into `parts` contiguous ranges whose lengths differ by at most one, the longer ones first.

    Ranges are empty where there are more parts than things.
    """
    if total < 0 or parts < 1:
        raise ValueError(f"cannot share {total} things among {parts} ranks; need total >= 0 and at least one rank")
    small, longer = divmod(total, parts)
    starts = [part * small + min(part, longer) for part in range(parts + 1)]
    return [range(start, stop) for start, stop in pairwise(starts)]


def owners(num_particles: int, world_size: int) -> list[list[int]]:
    """The particle ids of every rank: contiguous, balanced, first ranks one more; a rank may own none."""
    return [list(ids) for ids in shares(num_particles, world_size)]
