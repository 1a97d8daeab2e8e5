"""Where paged particles are between their turns: a page of each, one of its last good state, and one of what is never
trained."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from distvsd.errors import RunError
from distvsd.particles.base import Adaptive, Particle
from distvsd.particles.group import without_frozen
from distvsd.particles.store.image import Layout
from distvsd.particles.store.pages import WHAT_HELPS, Pages, Paging
from distvsd.particles.stored import GOOD, blank_state

_log = logging.getLogger("distvsd")

State = Mapping[str, Tensor]


class Home:
    """States of particles by id; also their `Copies`. Everything but `write` and `read` is for the main thread only.

    A particle has two pages that take turns: to make its present state the good one, only their roles are exchanged,
    and the next `write` goes to the other. Frozen parameters are written once, unless their kind changes them itself.

    Where a page has changed on the disk or is gone, `Paging.backup` is asked. If the newest checkpoint, or the initial
    state, has the bytes that the page had, nothing is lost. Else the particle goes back to the saved state, or before
    the first save to its good or initial one.
    """

    def __init__(
        self,
        particle: Particle,
        paging: Paging,
        device: torch.device,
        initial: Callable[[int], State],
        present: Callable[[int], State],
    ) -> None:
        """initial, present: the state of a particle with names as `Group.state_of`; what is missing is zero."""
        self._paging, self._device, self._initial, self._present_of = paging, device, initial, present
        like = blank_state(particle)
        moving = without_frozen(like)
        frozen = {name: value for name, value in like.items() if name not in moving}
        self._layout = Layout(moving)
        self._frozen = Layout(frozen) if frozen else None
        self._adapts = isinstance(particle, Adaptive)
        self._pages = Pages(paging, pinned=device.type == "cuda")
        self._turned: set[int] = set()  # particles whose present page is the second
        self._kept: set[int] = set()  # particles whose other page is their good state
        self.set_back: list[int] = []
        self.found_again: list[int] = []

    def begin(self, particle_id: int, state: State) -> None:
        """The first pages of a particle. Raises RunError where the disk has no room for them."""
        pages = [(self._name(particle_id), self._layout)]
        if self._frozen is not None:
            pages.append((_frozen_name(particle_id), self._frozen))
        for name, layout in pages:
            page = layout.filled(self._pages.room_for(name, layout), state, non_blocking=True)
            self.wait()
            if problem := self._pages.write(name, page):
                raise RunError(f"{problem}; {WHAT_HELPS}")
        if self._paging.keeps_good:
            self._pages.reserve(self._other(particle_id), self._layout)

    def scratch(self) -> Tensor:
        """A page for the thread that reads and writes files."""
        return self._pages.blank(self._layout)

    def write(self, particle_id: int, state: State, scratch: Tensor | None = None) -> bool:
        """The particle's present state. True where the disk failed and `scratch` is kept."""
        if self._frozen is not None and self._adapts:
            name = _frozen_name(particle_id)
            fixed = self._frozen.filled(self._pages.room_for(name, self._frozen), state, non_blocking=True)
            self.wait()
            self._pages.write(name, fixed)
        name = self._name(particle_id)
        page = self._pages.room_for(name, self._layout, scratch)
        self._layout.filled(page, state, non_blocking=True)
        self.wait()
        return self._pages.write(name, page) is not None and page is scratch

    def read(self, particle_id: int, scratch: Tensor | None = None) -> tuple[dict[str, Tensor], str | None]:
        """The state in host memory, and what is wrong with a page of it. The tensors may be the page's own."""
        page, problem = self._pages.read(self._name(particle_id), self._layout, scratch)
        state = self._layout.views(page)
        if self._frozen is not None:
            fixed, worse = self._pages.read(_frozen_name(particle_id), self._frozen)
            state |= self._frozen.views(fixed)
            problem = problem or worse
        return state, problem

    def sound(self, particle_id: int) -> dict[str, Tensor]:
        """The state in host memory, restored where a page is lost."""
        state, problem = self.read(particle_id)
        return state if problem is None else self.restored(particle_id, problem)

    def restored(self, particle_id: int, problem: str) -> dict[str, Tensor]:
        """The state of a particle whose page is lost, which is written again. problem: what was found."""
        saved, initial = self._paging.backup(particle_id), self._initial(particle_id)
        if self._frozen is not None:
            self._rewrite(_frozen_name(particle_id), self._frozen, [saved, initial])
        fallback = ("went back to its last saved state", saved)
        if saved is None:
            good = self.kept(particle_id)
            fallback = ("went back to its last good state", good) if good else ("began anew", initial)
        if self._rewrite(self._name(particle_id), self._layout, [saved, initial, fallback[1]]):
            self.found_again.append(particle_id)
            _log.warning("%s; the same state was read from a checkpoint, or made again", problem)
        else:
            self.set_back.append(particle_id)
            _log.warning("%s; particle %d %s", problem, particle_id, fallback[0])
        return self.read(particle_id)[0]

    def _rewrite(self, name: str, layout: Layout, states: list[State | None]) -> bool:
        """Writes a lost page again: the first of these states that has its bytes, else the last that is there. Returns
        whether the bytes are the same."""
        page, found = self._pages.blank(layout), False
        for state in states:
            if state is not None and not found:
                found = self._pages.matches(name, layout.filled(page, state))
        self._pages.write(name, page)
        return found

    def keep_present(self, particle_id: int) -> None:
        """See `Copies`; the particle's page has its present state, because it has not moved since it was read."""
        self._turned.symmetric_difference_update({particle_id})
        self._kept.add(particle_id)

    def keep(self, particle_id: int, tensors: State) -> None:
        name = self._other(particle_id)
        page = self._layout.filled(self._pages.room_for(name, self._layout), tensors, non_blocking=True)
        self.wait()
        self._pages.write(name, page)
        self._kept.add(particle_id)

    def kept(self, particle_id: int) -> dict[str, Tensor] | None:
        """See `Copies`; in place of a page that is lost, what the newest checkpoint has, or else the present state."""
        if particle_id not in self._kept:
            return None
        name = self._other(particle_id)
        page, problem = self._pages.read(name, self._layout)
        if problem is not None:
            saved = self._paging.backup(particle_id)
            good = {key.removeprefix(GOOD): value for key, value in (saved or {}).items() if key.startswith(GOOD)}
            last = good or saved or self._present_of(particle_id)
            is_same = self._rewrite(name, self._layout, [good or None, saved, last])
            what = "the same one was read from a checkpoint" if is_same else "a saved or present state takes its place"
            _log.warning("%s, which held the last good state of particle %d; %s", problem, particle_id, what)
            page, _ = self._pages.read(name, self._layout)
        return self._layout.views(page)

    def has(self, particle_id: int) -> bool:
        return particle_id in self._kept

    def forget(self, particle_id: int) -> None:
        self._kept.discard(particle_id)

    def wait(self) -> None:
        """Until the copies of a GPU that were started in this thread are done."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def close(self) -> None:
        self._pages.close()

    def _name(self, particle_id: int) -> str:
        return f"{particle_id:06d}.{int(particle_id in self._turned)}"

    def _other(self, particle_id: int) -> str:
        return f"{particle_id:06d}.{int(particle_id not in self._turned)}"


def _frozen_name(particle_id: int) -> str:
    return f"{particle_id:06d}.frozen"
