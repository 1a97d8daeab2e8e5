"""Whether another rank is lost, for a rank that waits for it so long that its own timeout is no answer.

Ranks load for very different times, so that silence in a collective proves nothing. Their heartbeats go on meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from distvsd.errors import RankError

# A rank that has ended tells the others why in the collective that they are in; only if that does not come it is lost.
_ENDED_S: Final = 5.0
_GAVE_UP_S: Final = 1.0
# Heartbeats of a healthy rank may fail to arrive for a while: a slow disk, its cache on this machine, or one long call
# into a library that holds the interpreter's lock.
_SILENT_S: Final = 60.0


class Sign(Protocol):
    """What is read of another rank; see `runtime.heartbeat.Beat`."""

    @property
    def beats(self) -> int: ...
    @property
    def ended(self) -> str: ...
    def process(self) -> str: ...


class Peers:
    """Looks at the ranks 1, 2, 4, ... places after this one, so that many ranks do not read all files of each other. A
    rank that gives up is seen by those before it, and so all end after a few looks.

    A rank is lost that has ended, `_ENDED_S` later (`_GAVE_UP_S` where it had lost others itself); that was stopped
    (SIGSTOP) for `timeout_s`, as far as this machine can see; and that does not beat for `timeout_s`, and for a minute
    at least. One without a file has not begun, or is done, and is not judged.
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
        """read: another rank's newest sign. now: seconds in which this rank itself could write its heartbeat; a disk
        that stands still for all accuses nobody."""
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
