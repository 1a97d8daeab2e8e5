"""Files of a rank's particles that are neither on its device nor in host memory, written and read in every round.

They belong to one process and are never read by another: a resume reads the checkpoint. So they need not survive a
power cut and are not forced to the disk. Whether a file has changed since it was written is known from its CRC-32,
which this process remembers.
"""

from __future__ import annotations

import contextlib
import os
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path

from distvsd.errors import RunError
from distvsd.faults import fault
from distvsd.runtime import inside


class PageFiles:
    """See `particles.store.pages.Disk`. The files are deleted with the object, at the latest when the process ends."""

    def __init__(self, root: Path, folder: str) -> None:
        """root: an existing folder. folder: below it, for this rank alone. Raises RunError."""
        self._root, self._folder = root, folder
        self._sums: dict[str, int] = {}
        inside.remove_folder(root, folder)
        inside.make_folder(root, folder)
        self._remove = weakref.finalize(self, _remove, root, folder, os.getpid())

    def write(self, name: str, page: memoryview) -> str | None:
        def work() -> None:
            fault("page.write", [_particle(name)])
            with os.fdopen(inside.open_file(self._root, self._file(name)), "wb") as stream:
                stream.write(page)

        problem = self._attempt(name, "written", work)
        if problem is None:
            self._sums[name] = zlib.crc32(page)
        return problem

    def read(self, name: str, page: memoryview) -> str | None:
        found = 0

        def work() -> None:
            nonlocal found
            fault("page.read", [_particle(name)])
            found = inside.read_into(self._root, self._file(name), page)

        problem = self._attempt(name, "read", work)
        if problem is not None:
            return problem
        if found != len(page):
            return f"{self._path(name)} has fewer bytes than were written"
        return None if self.matches(name, page) else f"{self._path(name)} has other bytes than were written"

    def matches(self, name: str, page: memoryview) -> bool:
        return self._sums.get(name) == zlib.crc32(page)

    def allocate(self, name: str, size: int) -> str | None:
        def work() -> None:
            with os.fdopen(inside.open_file(self._root, self._file(name)), "wb") as stream:
                os.posix_fallocate(stream.fileno(), 0, size)

        return self._attempt(name, "made", work)

    def close(self) -> None:
        self._remove()

    def _file(self, name: str) -> str:
        return f"{self._folder}/{name}.safetensors"

    def _path(self, name: str) -> Path:
        return self._root / self._file(name)

    def _attempt(self, name: str, done: str, work: Callable[[], None]) -> str | None:
        try:
            work()
        except RunError as error:
            return str(error)
        except OSError as error:
            return f"{self._path(name)} cannot be {done} ({error.strerror or error})"
        return None


def forget_pages(root: Path, folder: str, rank: int, size: int) -> None:
    """Deletes what a killed run left of the pages of ranks rank, rank + size, ...; every rank of a run calls it. Raises
    RunError."""
    for name in inside.names(root, folder):
        number = name.removeprefix("rank-")
        if number.isdecimal() and int(number) % size == rank:
            inside.remove_folder(root, f"{folder}/{name}")


def _particle(name: str) -> int:
    return int(name.partition(".")[0])


def _remove(root: Path, folder: str, pid: int) -> None:
    """Deletes the files, and the folder around them if it is empty. Not in a process that was forked meanwhile."""
    if os.getpid() != pid:
        return
    with contextlib.suppress(RunError, OSError):
        inside.remove_folder(root, folder)
        (root / folder).parent.rmdir()
