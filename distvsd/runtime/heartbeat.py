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
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from distvsd.errors import RankError, RunError
from distvsd.runtime import inside
from distvsd.runtime.process import is_from_here, may_live, process_state, system_id

_POLL_S: Final = 0.1
# Every record has this length, so that one is written over the one before without a byte of it left; the longest, 500
# characters of an error that JSON escapes, is well below.
_RECORD_BYTES: Final = 8192
# A record that is being written over may be read half old and half new.
_READS: Final = 5
_REREAD_S: Final = 0.02
_FILE: Final = re.compile(r"/rank-\d+\.json$", re.ASCII)
_MAX_HOSTS: Final = 16  # that one message names


@dataclass(frozen=True)
class _Beat:
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


class Heartbeat:
    """One rank's sign of life while entered, `RUN/heartbeats/rank-00003.json`; a daemon thread writes it.

    The file holds rank, host, pid, start (of the process, in ticks since boot), system (see `system_id`), round, phase,
    beats (a count) and, once the block was left by an error, `ended`. Left without an error it is deleted. It is
    written over in place, which takes no space: a rank beats on when the disk is full. Nothing here raises: a full disk
    must not end a run. Under a launcher (WORLD_SIZE above 1 in the environment) the thread also watches the parent:
    once the launcher has died, `on_orphan` is called, on that thread, and a process that then gets nowhere for
    `grace_s`, or for as long as it has told `at`, ends with code 1, so that no device stays taken by processes that
    nobody can stop.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        size: int,
        on_orphan: Callable[[], None],
        interval_s: float = 1.0,
        grace_s: float = 120.0,
    ) -> None:
        """folder: on a disk that all ranks share."""
        self._root, self._folder, self._rank, self._size = folder.parent, folder, rank, size
        self._on_orphan, self._interval_s, self._grace_s = on_orphan, interval_s, grace_s
        self._place: tuple[int, str] = (0, "start")
        self._arrived, self._patience_s = time.monotonic(), grace_s
        self._beats, self._ended = 0, ""
        self._parent = os.getppid() if os.environ.get("WORLD_SIZE", "1") not in ("", "1") else None
        self._orphan_since: float | None = None
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        with contextlib.suppress(OSError, RunError):
            self._root.mkdir(parents=True, exist_ok=True)
            inside.make_folder(self._root, self._folder.name)
            mine = {self._name(rank) for rank in range(self._size)}
            for name in inside.names(self._root, self._folder.name) if self._rank == 0 else ():
                name = f"{self._folder.name}/{name}"
                if _FILE.search(name) and name not in mine:  # a run on more ranks before this one
                    inside.delete(self._root, name)
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

        takes_s: how long it may be there, if that is longer than the grace of an orphan.
        """
        self._place = round, phase
        self._arrived, self._patience_s = time.monotonic(), max(self._grace_s, takes_s)

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
        if any(beat is not None and _is_plainly_lost(beat) for beat in before.values()):
            before = {}  # the others had no time to beat again, and are not judged by it
        else:
            time.sleep(wait_s)
        after = {rank: self._read(rank) for rank in others}
        lost = [_describe(rank, before.get(rank), after[rank]) for rank in others]
        found = [text for text in lost if text] or self._elsewhere(after) or _apart(after)
        return "; ".join(found)

    def _elsewhere(self, beats: dict[int, _Beat | None]) -> list[str]:
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
            self._watch_parent()

    def _watch_parent(self) -> None:
        if self._parent is None or os.getppid() == self._parent:
            return
        now = time.monotonic()
        if self._orphan_since is None:
            self._orphan_since = now
            self._on_orphan()
        elif now - max(self._orphan_since, self._arrived) > self._patience_s:
            text = f"rank {self._rank}: its launcher died {now - self._orphan_since:.0f} s ago; ending\n"
            with contextlib.suppress(OSError):
                os.write(2, text.encode())
            os._exit(1)

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
            finally:
                os.close(handle)

    def _read(self, rank: int) -> _Beat | None:
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


def _parsed(content: bytes) -> _Beat | None:
    """None for what is not a whole record."""
    try:
        beat = _Beat(**json.loads(content))
    except (ValueError, TypeError, RecursionError):
        return None
    # The annotations are the names of the types, see the import of `annotations`.
    kinds = {field.name: field.type for field in fields(_Beat)}
    return beat if all(type(value).__name__ == kinds[name] for name, value in vars(beat).items()) else None


def _apart(beats: dict[int, _Beat | None]) -> list[str]:
    """What is left where no rank is lost and all wait for each other."""
    hosts = sorted({socket.gethostname(), *(beat.host for beat in beats.values() if beat is not None)})
    if len(hosts) == 1:
        return []
    named = ", ".join(hosts[:_MAX_HOSTS]) + (f" and {len(hosts) - _MAX_HOSTS} more" if len(hosts) > _MAX_HOSTS else "")
    return [f"no rank is lost, so the network between hosts {named} is cut, or slower than parallel.timeout_s"]


def _is_plainly_lost(beat: _Beat) -> bool:
    return not beat.ended and beat.process() in ("gone", "stopped")


def _describe(rank: int, before: _Beat | None, after: _Beat | None) -> str:
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
