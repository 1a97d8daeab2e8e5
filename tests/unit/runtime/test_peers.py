"""Which rank is lost, as judged by a rank that waits for it: heartbeats against a simulated clock."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from distvsd.errors import RankError
from distvsd.runtime.peers import Peers


@dataclass(frozen=True)
class Sign:
    beats: int = 1
    ended: str = ""
    state: str = "exists"

    def process(self) -> str:
        return self.state


def lost_after(sign: Sign | None, timeout_s: float, beats_every_s: float = 1e9) -> float | None:
    """How many seconds rank 0 of 2 looks at a sign before it gives up; None if that takes more than ten minutes."""
    peers = Peers(0, 2, timeout_s)
    for second in range(600):
        now = sign and replace(sign, beats=sign.beats + int(second / beats_every_s))
        if peers.is_one_lost(lambda rank, now=now: now, float(second)):  # type: ignore[misc]
            return second
    return None


@pytest.mark.parametrize(
    ("sign", "timeout_s", "beats_every_s", "seconds"),
    [
        (Sign(state="stopped"), 7, 1e9, 7),
        (Sign(state="stopped"), 120, 1e9, 120),
        # Silent, but not seen to be stopped: another machine, a slow disk, a library that holds the interpreter's lock.
        (Sign(), 7, 1e9, 60),
        (Sign(state=""), 120, 1e9, 120),
        (Sign(), 7, 59, None),
        (Sign(state="gone"), 120, 1e9, 5),
        (Sign(ended="OSError: boom"), 120, 1e9, 5),
        (Sign(ended=f"{RankError.__name__}: lost", state="gone"), 120, 1e9, 1),
        (None, 7, 1e9, None),  # it has not begun, or is done
    ],
)
def test_how_long_a_rank_is_waited_for(
    sign: Sign | None, timeout_s: float, beats_every_s: float, seconds: float | None
) -> None:
    assert lost_after(sign, timeout_s, beats_every_s) == seconds


def test_a_rank_that_was_continued_is_waited_for_again() -> None:
    peers, stopped = Peers(0, 2, 7), Sign(state="stopped")
    for second, sign in enumerate([stopped] * 6 + [Sign(beats=2)] + [stopped] * 7):
        assert not peers.is_one_lost(lambda rank, sign=sign: sign, float(second))  # type: ignore[misc]
    assert peers.is_one_lost(lambda rank: stopped, 14.0)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 100])
def test_one_lost_rank_ends_all_in_a_few_looks_although_each_looks_at_few(size: int) -> None:
    """Each of n ranks looks at the log2 n ranks 2^k places ahead; after as many looks all have ended."""
    gone = {size // 2}
    looks = 0
    while len(gone) < size:
        ended = {rank: Sign(ended=RankError.__name__) if rank in gone else Sign() for rank in range(size)}
        read: set[int] = set()
        for rank in set(range(size)) - gone:
            peers, asked = Peers(rank, size, 7), []
            for now in (0.0, 1.0):
                is_lost = peers.is_one_lost(lambda other: asked.append(other) or ended[other], now)  # type: ignore[func-returns-value] # noqa: B023
            assert rank not in asked and len(set(asked)) <= size.bit_length()
            if is_lost:
                read.add(rank)
        assert read, "nobody hears of it"
        gone |= read
        looks += 1
    assert looks <= size.bit_length()
