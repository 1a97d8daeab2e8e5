"""Which rank owns which particle: a function of the counts alone, so every rank knows it without communication."""

from __future__ import annotations


def share(total: int, parts: int, part: int) -> range:
    """Part `part` of `range(total)` cut into `parts` contiguous ranges whose lengths differ by at most one.

    The longer ranges come first. Some are empty if there are more parts than items. Constant time.
    """
    if total < 0 or parts < 1:
        raise ValueError(f"cannot divide {total} items among {parts} ranks; need total >= 0 and at least one rank")
    small, longer = divmod(total, parts)
    start = part * small + min(part, longer)
    return range(start, start + small + (part < longer))


def owners(num_particles: int, world_size: int) -> list[list[int]]:
    """The particle ids of every rank: contiguous, balanced, longer for the first ranks; a rank may own none."""
    return [
        list(share(num_particles, world_size, rank)) for rank in range(max(world_size, 1))
    ]  # `share` refuses size 0
