"""Heartbeats: a small file that each rank rewrites every second, so that an error can name the rank that is lost.

A failed collective says only that some rank is gone. The files say which one, on which host, and in which phase of
which round.
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
# Every record is padded to this length, so that it overwrites the one before completely. The longest record, with 500
# characters of an error that JSON escapes, is far below.
_RECORD_BYTES: Final = 8192
# While a record is overwritten, a reader may get half of the old one and half of the new one; it reads again.
_READS: Final = 5
_REREAD_S: Final = 0.02
_FILE: Final = re.compile(r"rank-\d+\.json", re.ASCII)
_MAX_HOSTS: Final = 16  # named in one message


@dataclass(frozen=True)
class Beat:
    """The content of one rank's file."""

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
        """The state of the process: "gone", "stopped", "exists", or "" if it cannot be seen from here."""
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
    """Deletes the heartbeats of an earlier start. Only the holder of the run's lock may call it, before any rank of
    this start writes one."""
    with contextlib.suppress(RunError):
        for name in inside.names(folder.parent, folder.name):
            if _FILE.fullmatch(name):
                inside.delete(folder.parent, f"{folder.name}/{name}")


class Heartbeat:
    """One rank's heartbeat while entered, `RUN/heartbeats/rank-00003.json`, written by a daemon thread.

    The file holds rank, host, pid, start (of the process, in ticks since boot), system (see `system_id`), round, phase,
    beats (a count) and, after an error has left the block, `ended`. Without an error the file is deleted. It is
    overwritten in place, which takes no space, so it works on a full disk. Errors of the disk are ignored.
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
        self._thread.join(self._interval_s)  # it may hang on a disk that does not answer; as a daemon it delays no exit
        if value is None:
            with contextlib.suppress(OSError, RunError):
                inside.delete(self._root, self._name(self._rank))
                self._folder.rmdir()  # fails until the last rank leaves
            return
        self._ended = f"{type(value).__name__}: {value}"[:500]
        self._write()

    def at(self, round: int, phase: str, takes_s: float = 0.0) -> None:
        """Sets the round and phase of this rank. Cheap: the next beat writes it.

        takes_s: how long the phase may take, if longer than the grace of `is_stuck`.
        """
        self._place = round, phase
        self._arrived, self._patience_s = time.monotonic(), max(self._grace_s, takes_s)

    def is_stuck(self, since: float) -> bool:
        """Whether this rank has been in one phase for longer than the grace or the `takes_s` of `at`, counted from
        `since` (`time.monotonic`) at the earliest. May be called from any thread."""
        return time.monotonic() - max(since, self._arrived) > self._patience_s

    def refuse_lost(self) -> None:
        """Raises RankError once another rank is lost (see `Peers`); `silent` then says which one. Call it repeatedly
        during a long wait for the others. Cheap: it reads files once a beat."""
        if self._looked != self._written:
            self._looked = self._written
            if self._peers.is_one_lost(self._read, self._written * self._interval_s):
                raise RankError(
                    f"rank {self._rank} of {self._size} gave up waiting: another rank has ended, or its heartbeat has "
                    "stopped"
                )

    def silent(self, wait_s: float = 3.0) -> str:
        """Which ranks are lost, in one sentence; "" if all ranks beat in the same phase on one host. Never raises.

        Call it after a failed collective, inside the block, on any rank that is left. It reads every rank's file twice,
        `wait_s` seconds apart (once if a process is found dead or stopped), and compares the counts of beats, never the
        clocks of two hosts. If all ranks beat, it names those in another phase than this one, which may be slower than
        the timeout allows. If all wait in one phase on several hosts, it names the hosts.
        """
        self._write()  # the others see at once where this rank waits
        others = [rank for rank in range(self._size) if rank != self._rank]
        before = {rank: self._read(rank) for rank in others}
        if any(beat is not None and beat.is_lost() for beat in before.values()):
            before = {}  # no second look: the counts of the others say nothing
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
        """None if the file is missing or is not a heartbeat. Waits a moment for one that is being written."""
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
    """None for an incomplete record."""
    try:
        beat = Beat(**json.loads(content))
    except (ValueError, TypeError, RecursionError):
        return None
    # The annotations are the names of the types, see the import of `annotations`.
    kinds = {field.name: field.type for field in fields(Beat)}
    return beat if all(type(value).__name__ == kinds[name] for name, value in vars(beat).items()) else None


def _apart(beats: dict[int, Beat | None]) -> list[str]:
    """The explanation if no rank is lost and all wait for each other: the network between hosts."""
    hosts = sorted({socket.gethostname(), *(beat.host for beat in beats.values() if beat is not None)})
    if len(hosts) == 1:
        return []
    named = ", ".join(hosts[:_MAX_HOSTS]) + (f" and {len(hosts) - _MAX_HOSTS} more" if len(hosts) > _MAX_HOSTS else "")
    return [f"no rank is lost, so the network between hosts {named} is cut, or slower than parallel.timeout_s"]


def _describe(rank: int, before: Beat | None, after: Beat | None) -> str:
    """Why a rank counts as lost, "" if it does not. Without `before` the count of beats is ignored."""
    if after is None:
        return f"rank {rank} has no heartbeat file: it ended, or never began"
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
