"""Ranks that are slower than the others, and the pauses of Python's own that make one rank slow in every round."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from typing import Final

THRESHOLD: Final = 1.5
WINDOWS: Final = 3
ROUNDS_BETWEEN_COLLECTIONS: Final = 1000


class Stragglers:
    """Names a rank that needs more than `THRESHOLD` times as long as the others in `WINDOWS` windows in a row.

    Pure: the same numbers give the same answers on every rank. particles: how many each rank owns. Its seconds are
    taken for one particle then, because a rank that owns twice as many is not to blame, and ranks that own none are not
    compared. Without it every rank is expected to take as long as the others.
    """

    def __init__(self, particles: Sequence[int] | None = None) -> None:
        self._particles = None if particles is None else list(particles)
        self._ratio = 1.0
        self._slowest: int | None = None
        self._windows = 0

    @property
    def ratio(self) -> float:
        """The slowest rank of the last window against the median one; 1 is perfect balance."""
        return self._ratio

    def observe(self, seconds_by_rank: Sequence[float], hosts: Sequence[str] | None = None) -> str | None:
        """One window; returns a warning when a rank has just been slow for `WINDOWS` of them, once a streak.

        seconds_by_rank: of each rank's own work only. Time in collectives must not be in it: there every rank waits for
        the slowest, and all look alike. hosts: by rank, to be named.
        """
        compared = self._for_one_particle(seconds_by_rank)
        # The lower median: of two ranks the faster one, not a mean that the slow one is part of.
        median = statistics.median_low(compared.values()) if compared else 0.0
        slowest = max(compared, key=lambda rank: compared[rank], default=None)
        self._ratio = compared[slowest] / median if slowest is not None and median > 0 else 1.0
        if slowest is None or self._ratio <= THRESHOLD:
            self._slowest, self._windows = None, 0
            return None
        self._windows = self._windows + 1 if slowest == self._slowest else 1
        self._slowest = slowest
        if self._windows != WINDOWS:
            return None
        where = f"rank {slowest} of {len(seconds_by_rank)}" + (f" on {hosts[slowest]}" if hosts else "")
        return (
            f"{where} is a straggler: {self._ratio:.1f} times as long as the median rank in its own work, "
            f"{WINDOWS} windows in a row ({compared[slowest]:.3g} s against {median:.3g} s"
            f"{'' if self._particles is None else ' a particle'}); every round waits for it. Look at what else that "
            "machine does (nvidia-smi, top), or leave it out"
        )

    def _for_one_particle(self, seconds_by_rank: Sequence[float]) -> dict[int, float]:
        if self._particles is None:
            return dict(enumerate(seconds_by_rank))
        pairs = enumerate(zip(seconds_by_rank, self._particles, strict=True))
        return {rank: seconds / owned for rank, (seconds, owned) in pairs if owned}


def tame_garbage_collector() -> Callable[[int], None]:
    """Turns Python's own collections off; returns a function of the round that collects in every 1000th one.

    Left alone, every rank pauses at a moment of its own and all others wait for it; this way they pause in the same
    round. What lives now is never looked at again. `gc.unfreeze` and `gc.enable` undo it.
    """
    gc.collect()
    gc.freeze()
    gc.disable()

    def collect(round: int) -> None:
        if round and round % ROUNDS_BETWEEN_COLLECTIONS == 0:
            gc.collect()

    return collect
