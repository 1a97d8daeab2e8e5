"""The progress line of rank 0: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO


class Progress:
    """The progress line of one process. Call `update` after each round. On a terminal it draws at most ten times a
    second; elsewhere it prints a line every `every` rounds and after the last one.

    A broken stream (`| head`) silences it and does not disturb the run.
    """

    def __init__(
        self,
        rounds: int,
        particles: int,
        every: int = 10,
        is_shown: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        turns: int = 1,
    ) -> None:
        """rounds: of the whole run. particles: of all ranks. is_shown: pass `rank == 0`. clock: seconds. turns: a
        particle takes part in every so many-th round."""
        self._turns = turns
        self._rounds, self._particles, self._every, self._clock = rounds, particles, max(every, 1), clock
        self._stream = (stream or sys.stderr) if is_shown else None
        self._is_live = self._stream is not None and self._stream.isatty()
        self._drawn_at, self._drawn = -math.inf, ""
        self._begun: tuple[int, float] | None = None

    def update(self, round: int, updates_per_s: float, score_loss: float, healthy: int) -> None:
        """round: rounds completed. updates_per_s: particle updates a second. The counts are of all ranks."""
        now = self._clock()
        if self._begun is None:  # speed is measured from here: without the slow first round, and those before a resume
            self._begun = (round, now)
        line = (
            f"round {round}/{self._rounds}  {updates_per_s:.3g} updates/s  ETA {self._eta(round, now)}  "
            f"score loss {score_loss:.4g}  healthy {healthy}/{self._particles}"
        )
        if self._turns > 1:
            line += f"  {round / self._turns:.4g} updates a particle"
        is_last = round >= self._rounds
        if not self._is_live:
            if is_last or round % self._every == 0:
                self._write(line + "\n")
        elif is_last or now - self._drawn_at >= 0.1:
            self._drawn_at = now
            self._draw(line)

    def note(self, text: str) -> None:
        """Prints a line of its own; on a terminal above the live one."""
        drawn = self._drawn
        self._draw("")
        self._write(text + "\n")
        self._draw(drawn)

    def close(self) -> None:
        """Leaves the last line where it is."""
        if self._drawn:
            self._write("\n")
            self._drawn = ""

    def _eta(self, round: int, now: float) -> str:
        first, began = self._begun or (round, now)
        if round <= first:
            return "0:00" if round >= self._rounds else "--"
        return duration((self._rounds - round) * (now - began) / (round - first))

    def _draw(self, line: str) -> None:
        if self._is_live and (line or self._drawn):
            width = shutil.get_terminal_size().columns - 1
            self._drawn = line
            self._write(f"\r{line[:width]}\x1b[K")

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # ValueError: the stream was closed
            self._stream, self._is_live = None, False


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as people write them: 0:07, 12:34, 1:02:03."""
    whole = max(0, math.ceil(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
