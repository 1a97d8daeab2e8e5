"""The store whose particles are all on the device, all of the time, and active in every round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from distvsd.config import ParticlesConfig
from distvsd.particles.base import Handed, HandedRows, Parameters, Particle, blank_parameters
from distvsd.particles.good import Copies, HostCopies
from distvsd.particles.group import Group
from distvsd.vsd.samples import slices

FIRST_GROUP = 8  # particles of a group until its size has been measured


def group_size(config: ParticlesConfig) -> int:
    """Particles of a group at first; 0 for one group."""
    return FIRST_GROUP if config.micro_batch == "auto" else config.micro_batch


class Resident:
    """See `ParticleStore`. groups: what is rendered in one call each; views of one allocation for each parameter."""

    def __init__(
        self,
        particle: Particle,
        ids: Sequence[int],
        config: ParticlesConfig,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        source: HandedRows | None = None,
        blank: bool = False,
    ) -> None:
        """Fresh particles. config: `micro_batch` is the size of a group, 0 for one group; `betas` and `eps` are Adam's.

        source: what they begin from, rows in the order of `ids`; kept, because a particle may have to begin again.
        blank: zeros instead of initial values, for particles whose saved state is loaded next; needs no source.
        """
        self.particle, self.seed, self.ids = particle, seed, list(ids)
        self.device = torch.device(device)
        self._source = None if source is None else source.rows(slice(None))
        self.copies: Copies = HostCopies(self.state_of)
        size = group_size(config)
        chosen = torch.tensor(self.ids, dtype=torch.int64, device=device)
        parameters = blank_parameters(particle, chosen) if blank else self._fresh(chosen, size)
        self._all = Group.of(particle, self.ids, chosen, parameters, config.betas, config.eps)
        self.groups: list[Group] = []
        self.regroup(size)

    def _fresh(self, ids: Tensor, size: int) -> Parameters:
        """The initial values of `ids`, made `size` at a time."""
        if not 0 < size < len(ids):
            return self.particle.init(self.seed, ids, self._source)
        whole = blank_parameters(self.particle, ids)
        for first in range(0, len(ids), size):
            rows = slice(first, first + size)
            for name, value in self.particle.init(self.seed, ids[rows], self._rows(rows)).items():
                whole[name][rows] = value
        return whole

    def active(self, ids: Sequence[int], step: int) -> list[int]:
        return list(ids)

    def lease(self, step: int) -> Iterator[Group]:
        yield from list(self.groups)

    def regroup(self, size: int) -> None:
        rows = slices(len(self.ids), size)
        self.groups = [self._all] if len(rows) == 1 else [self._all.part(own) for own in rows]

    def commit(self, groups: list[Group]) -> None:
        """Nothing is to be done: the leased tensors are the particles'."""

    def split(self, group: Group) -> list[Group]:
        at = next(index for index, own in enumerate(self.groups) if own is group)
        self.groups[at : at + 1] = halves = group.halves()
        return halves

    def initial(self, particle_id: int) -> Parameters:
        row = self.ids.index(particle_id)
        chosen = torch.tensor([particle_id], device=self.device)
        fresh = self.particle.init(self.seed, chosen, self._rows(slice(row, row + 1)))
        return {name: value[0] for name, value in fresh.items()}

    def state_of(self, particle_id: int) -> dict[str, Tensor]:
        for group in self.groups:
            if particle_id in group.own:
                return group.state_of(group.own.index(particle_id))
        raise KeyError(f"particle {particle_id} is not on this rank, which owns {self.ids}")

    @torch.no_grad()
    def put(self, particle_id: int, state: Mapping[str, Tensor]) -> None:
        for name, target in self.state_of(particle_id).items():
            target.copy_(state[name])

    def take_losses(self) -> tuple[list[int], list[int]]:
        return [], []

    def close(self) -> None:
        """There is nothing to end."""

    def stream(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        for group in self.groups:
            for row, particle_id in enumerate(group.own):
                yield particle_id, group.state_of(row)

    def _rows(self, rows: slice) -> Handed | None:
        return None if self._source is None else self._source.rows(rows)
