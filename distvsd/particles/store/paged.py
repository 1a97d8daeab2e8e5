"""The store whose particles take turns: those of a round are on the device, the others in host memory or on the disk.

A round's particles fill the slots. As soon as a group was updated its slots are given to particles of the next round,
by a thread beside the rounds, so that what a round needs is there when it begins.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from distvsd.config import ParticlesConfig
from distvsd.particles.base import HandedRows, Parameters, Particle, blank_parameters
from distvsd.particles.good import Copies
from distvsd.particles.group import Group
from distvsd.particles.store.home import Home, State
from distvsd.particles.store.pages import Paging, copied
from distvsd.particles.store.resident import FIRST_GROUP, group_size
from distvsd.particles.store.worker import Job, Worker
from distvsd.vsd.samples import slices


class Paged:
    """See `ParticleStore`. Particle i is active in the rounds with the same remainder by `turns` as i, on any rank.

    slots: how many particles are on the device at once, those of the fullest round.
    """

    def __init__(
        self,
        particle: Particle,
        ids: Sequence[int],
        config: ParticlesConfig,
        *,
        seed: int,
        paging: Paging,
        device: torch.device | str = "cpu",
        source: HandedRows | None = None,
    ) -> None:
        """Fresh particles, made one group after the other. config: see `Resident`. source: what they begin from, read
        in parts; kept. Raises RunError where the disk has no room for all of them."""
        self.particle, self.seed, self.ids = particle, seed, list(ids)
        self.device = torch.device(device)
        self._paging, self._source = paging, source
        self._home = Home(particle, paging, self.device, lambda own: _named(self.initial(own)), self.state_of)
        self._own = set(self.ids)
        self.slots = max(Counter(own % paging.turns for own in self.ids).values(), default=0)
        numbers = torch.zeros(self.slots, dtype=torch.int64, device=self.device)
        self._all = Group.of(
            particle, [0] * self.slots, numbers, blank_parameters(particle, numbers), config.betas, config.eps
        )
        self._rows = [_unversioned(self._all.state_of(row)) for row in range(self.slots)]
        self._cuts: list[slice] = []
        self.regroup(group_size(config))
        self._begin(group_size(config) or FIRST_GROUP)
        self._step = 0
        self._holds: list[int | None] = [None] * self.slots  # the particle in each slot, or on its way there
        self._row: dict[int, int] = {}
        self._leased: set[int] = set()  # in slots that may differ from their pages
        self._arriving: dict[int, Job[str | None]] = {}
        self._leaving: dict[int, Job[str | None]] = {}
        self._scratch = self._home.scratch()
        self._worker = Worker("particle-pages")
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def _begin(self, size: int) -> None:
        for rows in slices(len(self.ids), size):
            own = self.ids[rows]
            chosen = torch.tensor(own, dtype=torch.int64, device=self.device)
            handed = None if self._source is None else self._source.rows(rows)
            fresh = self.particle.init(self.seed, chosen, handed)
            for row, particle_id in enumerate(own):
                self._home.begin(particle_id, _named({name: value[row] for name, value in fresh.items()}))

    @property
    def copies(self) -> Copies:
        return self._home

    def take_losses(self) -> tuple[list[int], list[int]]:
        found = self._home.found_again, self._home.set_back
        self._home.found_again, self._home.set_back = [], []
        return found

    def active(self, ids: Sequence[int], step: int) -> list[int]:
        turns = self._paging.turns
        return [particle_id for particle_id in ids if particle_id % turns == step % turns]

    def lease(self, step: int) -> Iterator[Group]:
        own = self.active(self.ids, step)
        if own != [held for held in self._holds if held is not None]:
            self._vacate()
            for row, particle_id in enumerate(own):
                self._exchange(row, particle_id)
        self._step = step
        idle = [0] * (self.slots - len(own))
        ids = torch.tensor(own + idle, dtype=torch.int64, device=self.device)
        whole = dataclasses.replace(self._all, own=own + idle, ids=ids)
        for cut in list(self._cuts):
            rows = slice(cut.start, min(cut.stop, len(own)))
            for particle_id in own[rows]:
                self._arrived(particle_id)
                self._leased.add(particle_id)
            if own[rows]:
                yield whole.part(rows)

    def regroup(self, size: int) -> None:
        self._cuts = slices(self.slots, size)

    def commit(self, groups: list[Group]) -> None:
        """The slots of these groups begin to be filled with particles of the next round."""
        following = self.active(self.ids, self._step + 1)
        freed = [self._row[particle_id] for group in groups for particle_id in group.own]
        empty = [row for row, held in enumerate(self._holds) if held is None]
        for row in freed + empty:
            self._exchange(row, following[row] if row < len(following) else None)

    def split(self, group: Group) -> list[Group]:
        first = self._row[group.own[0]]
        at = next(index for index, cut in enumerate(self._cuts) if cut.start == first)
        halves = group.halves()
        if len(halves) > 1:
            middle = first + len(halves[0].own)
            self._cuts[at : at + 1] = [slice(first, middle), slice(middle, self._cuts[at].stop)]
        return halves

    def initial(self, particle_id: int) -> Parameters:
        row = self.ids.index(particle_id)
        handed = None if self._source is None else self._source.rows(slice(row, row + 1))
        fresh = self.particle.init(self.seed, torch.tensor([particle_id], device=self.device), handed)
        return {name: value[0] for name, value in fresh.items()}

    def state_of(self, particle_id: int) -> dict[str, Tensor]:
        if particle_id not in self._own:
            raise KeyError(f"particle {particle_id} is not on this rank, which owns {self.ids}")
        if particle_id in self._row:
            self._arrived(particle_id)
            return self._rows[self._row[particle_id]]
        if particle_id in self._leaving:
            self._leaving.pop(particle_id).result()
        return self._home.sound(particle_id)

    def put(self, particle_id: int, state: State) -> None:
        if particle_id not in self._own:
            raise KeyError(f"particle {particle_id} is not on this rank, which owns {self.ids}")
        self._vacate()
        self._home.begin(particle_id, state)

    def stream(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        for particle_id in self.ids:
            yield particle_id, self.state_of(particle_id)

    def close(self) -> None:
        self._worker.close()
        self._home.close()

    def _arrived(self, particle_id: int) -> None:
        """Waits until the particle is in its slot; restores it where its page is lost."""
        if particle_id not in self._arriving:
            return
        problem = self._arriving.pop(particle_id).result()
        if problem is not None:
            copied(self._rows[self._row[particle_id]], self._home.restored(particle_id, problem))

    def _vacate(self) -> None:
        """Brings all particles home."""
        for row in range(self.slots):
            self._exchange(row, None)
        for jobs in (self._arriving, self._leaving):
            for job in jobs.values():
                job.result()
            jobs.clear()

    def _exchange(self, row: int, new: int | None) -> None:
        """Starts to bring the slot's particle home, if it may have changed, and `new` into the slot."""
        old = self._holds[row]
        if old == new:
            return
        leaving = old if old in self._leased else None
        is_updated = torch.cuda.current_stream(self.device).record_event() if self._stream is not None else None
        job = self._worker.do(lambda: self._carry(row, leaving, new, is_updated))
        self._holds[row] = new
        if old is not None:
            del self._row[old]
            self._leased.discard(old)
        if leaving is not None:
            self._leaving[leaving] = job
        if new is not None:
            self._row[new] = row
            self._arriving[new] = job

    def _carry(self, row: int, leaving: int | None, new: int | None, is_updated: torch.cuda.Event | None) -> str | None:
        """In the thread: the work of `_exchange`. Returns what is wrong with the page of `new`."""
        with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            if is_updated is not None:
                is_updated.wait()
            if leaving is not None and self._home.write(leaving, self._rows[row], self._scratch):
                self._scratch = self._home.scratch()
            if new is None:
                return None
            state, problem = self._home.read(new, self._scratch)
            if problem is None:
                copied(self._rows[row], state)
                self._home.wait()
            return problem


def _named(parameters: Parameters) -> dict[str, Tensor]:
    return {f"param/{name}": value.detach() for name, value in parameters.items()}


def _unversioned(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same memory. Autograd, which watches the whole allocation, must not take a change of one slot for a change of
    the others."""
    return {name: value.data for name, value in state.items()}
