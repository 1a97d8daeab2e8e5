"""Finds ranks that are slower than the others, and aligns the garbage collector's pauses over ranks."""

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

    The same numbers give the same answers on every rank. particles: how many each rank owns; then seconds a particle
    are compared, among ranks that own any. Without it the seconds of all ranks are compared.
    """

    def __init__(self, particles: Sequence[int] | None = None) -> None:
        self._particles = None if particles is None else list(particles)
        self._ratio = 1.0
        self._slowest: int | None = None
        self._windows = 0

    @property
    def ratio(self) -> float:
        """Time of the slowest rank in the last window over that of the median rank; 1 is perfect balance."""
        return self._ratio

    def observe(self, seconds_by_rank: Sequence[float], hosts: Sequence[str] | None = None) -> str | None:
        """Takes one window; returns a warning when a rank has been slow for `WINDOWS` in a row, once a streak.

        seconds_by_rank: of each rank's own work, without time in collectives, where every rank waits for the slowest.
        hosts: by rank, for the warning.
        """
        compared = self._for_one_particle(seconds_by_rank)
        # The lower median: of two ranks it is the faster one.
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
    """Turns automatic garbage collection off; returns a function of the round that collects in every 1000th round.

    Otherwise each rank would pause at another moment while all others wait; so they pause in the same round. Objects
    that exist now are never visited again. `gc.unfreeze` and `gc.enable` undo it.
    """
    gc.collect()
    gc.freeze()
    gc.disable()

    def collect(round: int) -> None:
        if round and round % ROUNDS_BETWEEN_COLLECTIONS == 0:
            gc.collect()

    return collect
