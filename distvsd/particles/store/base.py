"""What must be offered by whatever holds the particles of one rank.

A round leases the active particles group by group, renders and updates what it leased, and commits that. Nothing else
of a store is on the device for certain, and a round touches nothing else. What is committed may leave the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from distvsd.particles.base import Parameters, Particle
from distvsd.particles.good import Copies
from distvsd.particles.group import Group


class ParticleStore(Protocol):
    """The particles of one rank, all of one kind. Every method is local and communicates nothing."""

    particle: Particle
    seed: int
    """Of the run; with the ids and the round it keys everything random."""
    ids: list[int]
    """All particles of this rank, active or not."""
    device: torch.device
    """Where leased groups are."""

    @property
    def copies(self) -> Copies:
        """Holds the last good states of these particles."""
        ...

    def active(self, ids: Sequence[int], step: int) -> list[int]:
        """Which of these particles take part in this round, in their order; any rank's, not only this store's.

        A function of its arguments, so that every rank knows how many samples each rank has to give.
        """
        ...

    def lease(self, step: int) -> Iterator[Group]:
        """The groups of the active particles in the order of `active`, one after the other, on the device.

        A group stays valid until it is committed, whatever becomes of others.
        """
        ...

    def regroup(self, size: int) -> None:
        """From the next round on, groups of so many particles, or of fewer at the end."""
        ...

    def commit(self, groups: list[Group]) -> None:
        """Takes leased groups back after their update; every leased group is committed before the next lease."""
        ...

    def split(self, group: Group) -> list[Group]:
        """Replaces a leased group by its halves for the rest of the run, and returns them; a group of one particle
        stays. Allocates nothing: it is called when memory has run out."""
        ...

    def initial(self, particle_id: int) -> Parameters:
        """What the particle began with, without the leading axis; made anew."""
        ...

    def state_of(self, particle_id: int) -> dict[str, Tensor]:
        """See `Group.state_of`; on the device or the host. Writing to these tensors changes a leased particle, and
        nothing else need do so. Raises KeyError for another rank's."""
        ...

    def put(self, particle_id: int, state: Mapping[str, Tensor]) -> None:
        """Overwrites a particle that is not leased with a whole `state_of`. Raises KeyError for another rank's."""
        ...

    def stream(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Every particle's id and `state_of`, one after the other; a state is valid until the next is asked for."""
        ...

    def take_losses(self) -> tuple[list[int], list[int]]:
        """Particles whose numbers were lost outside of memory since the last call: those that have the same bits again,
        and those that went back to an older state."""
        ...

    def close(self) -> None:
        """Ends what the store does beside the rounds; nothing may be asked of it any more."""
        ...
