"""Decides from heartbeats whether another rank is lost, during waits that are much longer than a timeout.

Loading takes ranks very different times, so silence in a collective proves nothing then. Heartbeats continue meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from distvsd.errors import RankError

# A rank that ends tells the others why in their next collective. It counts as lost only if that message does not come.
_ENDED_S: Final = 5.0
_GAVE_UP_S: Final = 1.0
# The heartbeat of a healthy rank may stop for a while: a slow disk, a stale cache on this machine, or a long library
# call that holds the interpreter's lock.
_SILENT_S: Final = 60.0


class Sign(Protocol):
    """What is known of another rank; see `runtime.heartbeat.Beat`."""

    @property
    def beats(self) -> int: ...
    @property
    def ended(self) -> str: ...
    def process(self) -> str: ...


class Peers:
    """Watches the ranks 1, 2, 4, ... places after this one, so that many ranks need not read the files of all others. A
    rank that gives up is seen by the ranks that watch it, so all ranks end after a few looks.

    A rank counts as lost if it ended `_ENDED_S` ago (`_GAVE_UP_S` if it had lost another rank itself), if this machine
    sees it stopped (SIGSTOP) for `timeout_s`, or if it has not beaten for `timeout_s` and at least a minute. A rank
    without a file has not begun, or is done, and is not judged.
    """

    def __init__(self, rank: int, size: int, timeout_s: float) -> None:
        self._others = sorted({(rank + (1 << bit)) % size for bit in range(size.bit_length())} - {rank})
        self._patience = {
            "gave up": _GAVE_UP_S,
            "ended": _ENDED_S,
            "stopped": timeout_s,
            "silent": max(timeout_s, _SILENT_S),
        }
        self._since: dict[int, tuple[str, int, float]] = {}  # kind, count of beats, when first seen so

    def is_one_lost(self, read: Callable[[int], Sign | None], now: float) -> bool:
        """read: returns another rank's newest record. now: seconds for which this rank could write its own heartbeat,
        so that a disk that hangs for all ranks makes none of them lost."""
        return any(self._is_lost(rank, read(rank), now) for rank in self._others)

    def _is_lost(self, rank: int, sign: Sign | None, now: float) -> bool:
        if sign is None:
            self._since.pop(rank, None)
            return False
        kind = _kind(sign)
        known = self._since.get(rank)
        if known is None or known[:2] != (kind, sign.beats):
            known = self._since[rank] = (kind, sign.beats, now)
        return now - known[2] >= self._patience[kind]


def _kind(sign: Sign) -> str:
    if sign.ended:
        return "gave up" if sign.ended.startswith(RankError.__name__) else "ended"
    return {"gone": "ended", "stopped": "stopped"}.get(sign.process(), "silent")
