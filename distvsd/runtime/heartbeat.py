"""Signs of life: a small file that each rank rewrites every second, so that a report can name the rank that is silent.

A collective that fails tells only that somebody is gone. The files say who, where, and in which phase of which round.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from distvsd.errors import RankError, RunError
from distvsd.runtime import inside
from distvsd.runtime.peers import Peers
from distvsd.runtime.process import is_from_here, may_live, process_state, system_id

_POLL_S: Final = 0.1
# Every record has this length, so that one is written over the one before without a byte of it left; the longest, 500
# characters of an error that JSON escapes, is well below.
_RECORD_BYTES: Final = 8192
# A record that is being written over may be read half old and half new.
_READS: Final = 5
_REREAD_S: Final = 0.02
_FILE: Final = re.compile(r"rank-\d+\.json", re.ASCII)
_MAX_HOSTS: Final = 16  # that one message names


@dataclass(frozen=True)
class Beat:
    """One rank's file, as read."""

    rank: int
    host: str
    pid: int
    start: str
    round: int
    phase: str
    beats: int
    ended: str
    system: str = ""

    @property
    def place(self) -> tuple[int, str]:
        return self.round, self.phase

    def is_lost(self) -> bool:
        return not self.ended and self.process() in ("gone", "stopped")

    def process(self) -> str:
        """What is known of the process: "gone", "stopped", "exists", or "" where it cannot be seen from here."""
        name = f"{self.host}:{self.pid}:{self.start}:{self.system}".rstrip(":")
        if not is_from_here(name):
            return ""
        if not may_live(name):
            return "gone"
        return "stopped" if process_state(self.pid)[0] in ("T", "t") else "exists"

    def __str__(self) -> str:
        where = f"host {self.host}, pid {self.pid}"
        return f"rank {self.rank} ({where}, last seen in phase {self.phase!r} of round {self.round})"


def forget_ranks(folder: Path) -> None:
    """Deletes what the ranks of an earlier start have left there; for the holder of the run's lock, before any rank of
    this start beats."""
    with contextlib.suppress(RunError):
        for name in inside.names(folder.parent, folder.name):
            if _FILE.fullmatch(name):
                inside.delete(folder.parent, f"{folder.name}/{name}")


class Heartbeat:
    """One rank's sign of life while entered, `RUN/heartbeats/rank-00003.json`; a daemon thread writes it.

    The file holds rank, host, pid, start (of the process, in ticks since boot), system (see `system_id`), round, phase,
    beats (a count) and, once the block was left by an error, `ended`. Left without an error it is deleted. It is
    written over in place, which takes no space: a rank beats on when the disk is full. A full disk must not end a run,
    and raises nothing here.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        size: int,
        timeout_s: float = 120.0,
        interval_s: float = 1.0,
        grace_s: float = 120.0,
    ) -> None:
        """folder: on a disk that all ranks share. timeout_s: see `refuse_lost`. grace_s: see `is_stuck`."""
        self._root, self._folder, self._rank, self._size = folder.parent, folder, rank, size
        self._interval_s, self._grace_s = interval_s, grace_s
        self._place: tuple[int, str] = (0, "start")
        self._arrived, self._patience_s = time.monotonic(), grace_s
        self._beats, self._ended = 0, ""
        self._written = self._looked = 0
        self._peers = Peers(rank, size, timeout_s)
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        with contextlib.suppress(OSError, RunError):
            self._root.mkdir(parents=True, exist_ok=True)
            inside.make_folder(self._root, self._folder.name)
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.set()
        self._thread.join(self._interval_s)  # it may hang on a disk that does not answer; leave it to its daemon's end
        if value is None:
            with contextlib.suppress(OSError, RunError):
                inside.delete(self._root, self._name(self._rank))
                self._folder.rmdir()  # fails until the last rank leaves
            return
        # A lost peer is the consequence of what another rank's file tells.
        self._ended = f"{type(value).__name__}: {value}"[:500]
        self._write()

    def at(self, round: int, phase: str, takes_s: float = 0.0) -> None:
        """Where this rank is from now on. Cheap: nothing is written before the next beat.

        takes_s: how long it may be there, if that is longer than the grace of `is_stuck`.
        """
        self._place = round, phase
        self._arrived, self._patience_s = time.monotonic(), max(self._grace_s, takes_s)

    def is_stuck(self, since: float) -> bool:
        """Whether this rank has been in one place for longer than its grace, or than it has told `at`; counted from
        `since` (`time.monotonic`) at the earliest. May be called from any thread."""
        return time.monotonic() - max(since, self._arrived) > self._patience_s

    def refuse_lost(self) -> None:
        """For a rank that waits for the others for long: called again and again, it raises RankError once one of them
        is lost (`Peers`), and `silent` says which one. Cheap: it looks after each beat of this rank."""
        if self._looked != self._written:
            self._looked = self._written
            if self._peers.is_one_lost(self._read, self._written * self._interval_s):
                raise RankError(
                    f"rank {self._rank} of {self._size} gave up waiting: another rank has ended, or gives no sign of "
                    "life any more"
                )

    def silent(self, wait_s: float = 3.0) -> str:
        """Which ranks do not beat any more, in one sentence; "" if all do and all are at the same place.

        For after a failed collective, inside the block, on whichever ranks are left. Reads every rank's file, again
        after `wait_s` seconds unless a process was already found dead or stopped, and compares counts, never the clocks
        of two hosts. Where all ranks beat, those that are elsewhere than this one are named: one may be slower than
        the timeout allows. Where they wait in one place on several hosts, those are named. Never raises.
        """
        self._write()  # so that the others see at once where this rank waits
        others = [rank for rank in range(self._size) if rank != self._rank]
        before = {rank: self._read(rank) for rank in others}
        if any(beat is not None and beat.is_lost() for beat in before.values()):
            before = {}  # the others had no time to beat again, and are not judged by it
        else:
            time.sleep(wait_s)
        after = {rank: self._read(rank) for rank in others}
        lost = [_describe(rank, before.get(rank), after[rank]) for rank in others]
        found = [text for text in lost if text] or self._elsewhere(after) or _apart(after)
        return "; ".join(found)

    def _elsewhere(self, beats: dict[int, Beat | None]) -> list[str]:
        round, phase = self._place
        return [
            f"{beat} still beats while this rank waits in phase {phase!r} of round {round}"
            for beat in beats.values()
            if beat is not None and not beat.ended and beat.place != self._place
        ]

    def _run(self) -> None:
        next_beat = time.monotonic() + self._interval_s
        while not self._leaving.wait(min(_POLL_S, self._interval_s)):
            if time.monotonic() >= next_beat:
                self._write()
                next_beat = time.monotonic() + self._interval_s

    def _name(self, rank: int) -> str:
        return f"{self._folder.name}/rank-{rank:05d}.json"

    def _write(self) -> None:
        round, phase = self._place
        self._beats += 1
        record: dict[str, Any] = {
            "rank": self._rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "start": process_state(os.getpid())[1],
            "round": round,
            "phase": phase,
            "beats": self._beats,
            "ended": self._ended,
            "system": system_id(),
        }
        with contextlib.suppress(OSError, RunError):
            # Closed after every beat: network file systems show others what was written by then.
            handle = inside.open_file(self._root, self._name(self._rank))
            try:
                os.pwrite(handle, json.dumps(record).encode().ljust(_RECORD_BYTES), 0)
                self._written += 1
            finally:
                os.close(handle)

    def _read(self, rank: int) -> Beat | None:
        """None where the file is missing or is not one of ours. Waits a moment for one that is being written."""
        for _ in range(_READS):
            try:
                content = inside.read(self._root, self._name(rank))
            except RunError:
                return None
            if content is None:
                return None
            if beat := _parsed(content):
                return beat
            time.sleep(_REREAD_S)
        return None


def _parsed(content: bytes) -> Beat | None:
    """None for what is not a whole record."""
    try:
        beat = Beat(**json.loads(content))
    except (ValueError, TypeError, RecursionError):
        return None
    # The annotations are the names of the types, see the import of `annotations`.
    kinds = {field.name: field.type for field in fields(Beat)}
    return beat if all(type(value).__name__ == kinds[name] for name, value in vars(beat).items()) else None


def _apart(beats: dict[int, Beat | None]) -> list[str]:
    """What is left where no rank is lost and all wait for each other."""
    hosts = sorted({socket.gethostname(), *(beat.host for beat in beats.values() if beat is not None)})
    if len(hosts) == 1:
        return []
    named = ", ".join(hosts[:_MAX_HOSTS]) + (f" and {len(hosts) - _MAX_HOSTS} more" if len(hosts) > _MAX_HOSTS else "")
    return [f"no rank is lost, so the network between hosts {named} is cut, or slower than parallel.timeout_s"]


def _describe(rank: int, before: Beat | None, after: Beat | None) -> str:
    """Why a rank counts as lost, "" if it does not. Without `before` nothing is concluded from a count."""
    if after is None:
        return f"rank {rank} left no sign of life (it has no heartbeat file: it ended, or never began)"
    if after.ended:
        is_consequence = after.ended.startswith(RankError.__name__)
        return "" if is_consequence else f"{after} ended by itself: {after.ended}"
    match after.process():
        case "gone":
            return f"{after} is gone: that process does not exist any more"
        case "stopped":
            return f"{after} is stopped: that process exists, but was told to halt (SIGSTOP)"
        case state:
            if before is None or before.beats != after.beats:
                return ""
            more = ", though that process still exists" if state == "exists" else ""
            return f"{after} does not beat any more{more}"
