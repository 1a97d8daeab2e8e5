"""The states of a rank's particles that are not on its device: in host memory, or in a file each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from distvsd.errors import RunError
from distvsd.particles.store.image import Layout

_log = logging.getLogger("distvsd")


class Disk(Protocol):
    """Files of pages by name; see `runtime.pages.PageFiles`. What fails is told in words and raises nothing."""

    def write(self, name: str, page: memoryview) -> str | None:
        """Writes a page; returns why that failed, None if it did not."""
        ...

    def read(self, name: str, page: memoryview) -> str | None:
        """Reads what was written last into `page`; returns what is wrong with the file, None for the same bytes."""
        ...

    def matches(self, name: str, page: memoryview) -> bool:
        """Whether these are the bytes that were written last."""
        ...

    def allocate(self, name: str, size: int) -> str | None:
        """Takes the room of a page that is written later; returns why there is none."""
        ...

    def close(self) -> None:
        """Deletes all pages."""
        ...


@dataclass(frozen=True)
class Paging:
    """Where a rank's particles are between their turns.

    turns: each takes part in every so many-th round. in_memory: those that are at home in host memory; the others in
    files of `disk`. keeps_good: the run is long enough for good states, whose room on the disk is taken at the start.
    backup(id): the particle's file in the newest checkpoint, None without one; asked for where a page is lost.
    """

    turns: int
    in_memory: frozenset[int]
    disk: Disk | None = None
    keeps_good: bool = False
    backup: Callable[[int], Mapping[str, Tensor] | None] = lambda particle_id: None


def at_home_in_memory(ids: Collection[int], turns: int, most: int) -> frozenset[int]:
    """Which `most` of a rank's particles stay in host memory, all of them for a larger number.

    The choice never changes: particles come in turn, so what was used last is needed last. As many of every turn as
    possible, so that every round reads equally much from the disk.
    """
    by_turn = sorted(ids, key=lambda particle_id: (particle_id % turns, particle_id))
    total = max(len(by_turn), 1)
    most = min(most, total)
    return frozenset(own for place, own in enumerate(by_turn) if place * most // total != (place + 1) * most // total)


class Pages:
    """Pages by name, `000012.0` of particle 12. Used by two threads, which never work on the same page at once.

    A page that cannot be written to its file stays in host memory until it can: a full disk costs no state.
    """

    def __init__(self, paging: Paging, pinned: bool) -> None:
        self._paging, self._pinned = paging, pinned
        self._in_memory: dict[str, Tensor] = {}
        self._failing = ""  # why pages stay in memory, as it was told last

    def blank(self, layout: Layout) -> Tensor:
        return layout.blank(self._pinned)

    def room_for(self, name: str, layout: Layout, scratch: Tensor | None = None) -> Tensor:
        """The page to be filled and given to `write`: the page itself where it is in memory, else `scratch`."""
        if particle_of(name) in self._paging.in_memory and name not in self._in_memory:
            self._in_memory[name] = self.blank(layout)
        found = self._in_memory.get(name, scratch)
        return self.blank(layout) if found is None else found

    def write(self, name: str, page: Tensor) -> str | None:
        """Keeps a filled page under this name. Returns why it stays in memory although its home is a file.

        A page that stays is kept itself: the caller must not use it again.
        """
        disk = self._paging.disk
        if particle_of(name) in self._paging.in_memory or disk is None:
            self._in_memory[name] = page
            return None
        problem = disk.write(name, buffer_of(page))
        if problem is None:
            self._in_memory.pop(name, None)
        else:
            self._in_memory[name] = page
        if problem is not None and not self._failing:
            _log.warning("%s; pages that cannot be written stay in host memory", problem)
        self._failing = problem or ""
        return problem

    def read(self, name: str, layout: Layout, scratch: Tensor | None = None) -> tuple[Tensor, str | None]:
        """A page: itself where it is in memory, else read into `scratch`; and what is wrong with its file."""
        if name in self._in_memory:
            return self._in_memory[name], None
        page = self.blank(layout) if scratch is None else scratch
        disk = self._paging.disk
        assert disk is not None, f"page {name} has no home"
        return page, disk.read(name, buffer_of(page))

    def matches(self, name: str, page: Tensor) -> bool:
        """Whether these are the bytes that the file was written with."""
        disk = self._paging.disk
        return disk is not None and disk.matches(name, buffer_of(page))

    def reserve(self, name: str, layout: Layout) -> None:
        """Takes the room on the disk of a page that is written later. Raises RunError where there is none."""
        disk = self._paging.disk
        if disk is None or particle_of(name) in self._paging.in_memory:
            return
        if problem := disk.allocate(name, layout.size):
            raise RunError(f"{problem}; {WHAT_HELPS}")

    def close(self) -> None:
        self._in_memory.clear()
        if self._paging.disk is not None:
            self._paging.disk.close()


WHAT_HELPS = (
    "make room, raise particles.host, set particles.page_dir to a larger disk, or lower particles.count or the size of "
    "a particle"
)


def particle_of(name: str) -> int:
    return int(name.partition(".")[0])


def buffer_of(page: Tensor) -> memoryview:
    """The memory of a page, for files."""
    return memoryview(page.numpy())  # type: ignore[arg-type]  # before Python 3.12 arrays are not said to be buffers


def copied(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Overwrites tensors with those of the same names; may return before the copies of a GPU are done."""
    for name, value in source.items():
        target[name].copy_(value, non_blocking=True)
