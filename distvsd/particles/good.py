"""The last good states of particles: what one that keeps failing goes back to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from distvsd.errors import CheckpointError
from distvsd.particles.group import without_frozen
from distvsd.particles.health import shown

# Where a particle's last good state is: it is the present one, a copy beside that (in the same file of a checkpoint),
# or the initial one. The words are those of the manifest.
Place = Literal["present", "beside", "initial"]


def most_copies(rounds: int, every: int, good_every: int) -> int:
    """How often the largest checkpoint holds a particle: twice where a save falls between two good states.

    every: rounds between saves, 0 for none but the last. good_every: rounds between good states, which have a schedule
    of their own, so that no save, due or not, changes what a particle goes back to.
    """
    saves = [rounds]
    if every:
        # Of two saves on the way that follow each other both fall on good states only if all do.
        first = (good_every // every + 1) * every
        saves += [completed for completed in (first, first + every) if completed < rounds]
    return 2 if any(completed > good_every and completed % good_every for completed in saves) else 1


class Copies(Protocol):
    """One copy of a state for each particle that has one, without frozen parameters; kept by whoever keeps the
    particles."""

    def keep_present(self, particle_id: int) -> None:
        """The present state of a leased particle that has not moved since its lease becomes its copy."""
        ...

    def keep(self, particle_id: int, tensors: Mapping[str, Tensor]) -> None:
        """A copy of this state takes the place of the earlier one."""
        ...

    def kept(self, particle_id: int) -> dict[str, Tensor] | None:
        """The copy, on the host; None where there is none."""
        ...

    def has(self, particle_id: int) -> bool: ...

    def forget(self, particle_id: int) -> None: ...


class HostCopies:
    """Copies in host memory."""

    def __init__(self, state_of: Callable[[int], Mapping[str, Tensor]]) -> None:
        """state_of: the present state of a particle."""
        self._state_of = state_of
        self._copies: dict[int, dict[str, Tensor]] = {}

    def keep_present(self, particle_id: int) -> None:
        self.keep(particle_id, self._state_of(particle_id))

    def keep(self, particle_id: int, tensors: Mapping[str, Tensor]) -> None:
        """Overwrites the particle's earlier copy in place, so that nothing is allocated again."""
        kept = self._copies.setdefault(particle_id, {})
        for name, value in without_frozen(tensors).items():
            if name not in kept:
                kept[name] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            kept[name].copy_(value, non_blocking=True)  # CUDA orders it before the next update

    def kept(self, particle_id: int) -> dict[str, Tensor] | None:
        return self._copies.get(particle_id)

    def has(self, particle_id: int) -> bool:
        return particle_id in self._copies

    def forget(self, particle_id: int) -> None:
        self._copies.pop(particle_id, None)


class GoodStates:
    """The last good state of each particle of a shard; a particle without one goes back to its initial state."""

    def __init__(self, copies: Copies) -> None:
        """copies: holds those that are neither the present nor the initial state."""
        self._copies = copies
        self._settled: set[int] = set()  # the present state is the good one, and is not copied yet

    def mark(self, ids: Iterable[int]) -> None:
        """The present state of these becomes the good one; it is copied when they are about to move."""
        self._settled.update(ids)

    def before_moves(self, ids: Iterable[int]) -> None:
        """Copies the states of these leased particles that were marked; until a particle moves it needs no copy."""
        for particle_id in self._settled.intersection(ids):
            self._copies.keep_present(particle_id)
            self._settled.discard(particle_id)

    def keep(self, particle_id: int, tensors: Mapping[str, Tensor]) -> None:
        self._copies.keep(particle_id, tensors)

    def forget(self, particle_id: int) -> None:
        self._copies.forget(particle_id)
        self._settled.discard(particle_id)

    def kept(self, particle_id: int) -> dict[str, Tensor] | None:
        """The copy; None where the good state is the present or the initial one."""
        return None if particle_id in self._settled else self._copies.kept(particle_id)

    def place(self, particle_id: int) -> Place:
        if particle_id in self._settled:
            return "present"
        return "beside" if self._copies.has(particle_id) else "initial"


def saved_place(record: Mapping[str, Any] | None, has_copy: bool) -> Place:
    """Where a manifest's record of a particle says that its good state is. has_copy: whether its file holds one.

    Older manifests have no such word. They mean the copy if there is one; else the initial state in a bad streak; else
    the present state, which was marked as good when it was saved. Raises CheckpointError for another word.
    """
    record = record or {}
    place: Place = record.get("good", "beside" if has_copy else "initial" if record.get("bad") else "present")
    if place not in get_args(Place):
        raise CheckpointError(
            f"the manifest says good = {shown(place)} of a particle's health, which must be one of "
            f"{', '.join(get_args(Place))}; the checkpoint was altered: delete it to go on from an older one"
        )
    return place
