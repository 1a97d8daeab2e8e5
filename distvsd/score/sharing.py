"""Which renders travel between ranks to train the score network: `parallel.exchange`.

A step of the score network sums the gradients of its renders over all ranks, whoever computes them, and the draws of a
render are keyed by (particle, view, round). So all ways give the same adapter up to the rounding of a sum, and the same
bits where the sum is exact. Every rank must call every method equally often.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from distvsd.parallel.assign import owners
from distvsd.parallel.exchange import Exchange, Pending, complete, exclude, move, slice_for, summed_bytes
from distvsd.parallel.world import World
from distvsd.score.scattered import Renders, Scattered
from distvsd.vsd.samples import Samples

Mode = Literal["none", "all_to_all", "all_gather"]


class Coming(Protocol):
    """The renders of a round under way."""

    def wait(self) -> Renders:
        """Of all ranks, sorted by particle; the views of one particle keep their order."""
        ...


class Sharing(Protocol):
    """sent: bytes that this rank has sent since the process began, as `distvsd plan` counts them."""

    sent: int

    def start(self, samples: Samples, rows: Sequence[int]) -> Coming:
        """Starts the exchange of a round; collective. rows: how many samples each rank gives, by rank."""
        ...

    def exclude(self, renders: Renders, absent: list[int]) -> Renders:
        """The renders with weight 0 for the particles that any rank names; collective."""
        ...

    def part(self, batch: Renders, num_views: int) -> tuple[Tensor, Samples]:
        """What this rank trains on of the batch of a step: which rows `[n]`, and their samples. Every row is trained on
        by one rank, and the rows of a particle by the same. Collective where rows travel to the rank."""
        ...

    def keep(self, whole: Samples) -> Renders:
        """What this rank keeps of renders that every rank has, from a checkpoint; local."""
        ...

    def whole(self, renders: Renders) -> Samples:
        """These renders on every rank; collective unless every rank has them."""
        ...


class Everywhere:
    """`all_gather`: every rank gets all renders and trains on an equal share of a batch.

    share_of(n): this rank's share of n particles; `slice_for` of the world by default.
    """

    def __init__(self, world: World, share_of: Callable[[int], slice] | None = None) -> None:
        self._world, self._share_of = world, share_of or partial(slice_for, world)
        self.sent = 0

    def start(self, samples: Samples, rows: Sequence[int]) -> Coming:
        """See `Sharing`. One gather of the samples."""
        pending = Exchange(self._world, rows).start(samples)
        self.sent += pending.sent
        return pending

    def exclude(self, renders: Renders, absent: list[int]) -> Renders:
        """See `Sharing`. One sum of a number a render."""
        self.sent += summed_bytes(self._world, renders.weight)
        return exclude(self._world, renders, absent)

    def part(self, batch: Renders, num_views: int) -> tuple[Tensor, Samples]:
        """See `Sharing`. Local."""
        samples = _whole(batch)
        share = self._share_of(len(samples) // num_views)
        rows = slice(share.start * num_views, share.stop * num_views)
        return torch.arange(len(samples), device=samples.ids.device)[rows], samples[rows]

    def keep(self, whole: Samples) -> Renders:
        """See `Sharing`."""
        return whole

    def whole(self, renders: Renders) -> Samples:
        """See `Sharing`."""
        return _whole(renders)


class WithOwners:
    """`none`: renders stay with the owner of the particle, which trains on them; a rank may have more than others.

    Ranks tell each other ids and weights only. num_particles: of the run.
    """

    def __init__(self, world: World, num_particles: int) -> None:
        self._world = world
        self._firsts = torch.tensor([own[0] for own in owners(num_particles, world.size) if own], dtype=torch.int64)
        self.sent = 0

    def start(self, samples: Samples, rows: Sequence[int]) -> Coming:
        """See `Sharing`. One gather of ids and weights."""
        pending = Exchange(self._world, rows).start(_Label(samples.ids, samples.weight))
        self.sent += pending.sent
        return _Labelled(pending, samples[samples.ids.argsort(stable=True)])

    def exclude(self, renders: Renders, absent: list[int]) -> Renders:
        """See `Sharing`. One sum of a number a render."""
        self.sent += summed_bytes(self._world, renders.weight)
        return exclude(self._world, renders, absent)

    def part(self, batch: Renders, num_views: int) -> tuple[Tensor, Samples]:
        """See `Sharing`. Local: all that is here."""
        here = _scattered(batch)
        return here.rows, here.samples

    def keep(self, whole: Samples) -> Renders:
        """See `Sharing`. Those of the rank's own particles, whoever had them when they were saved."""
        rows = (self._owner_of(whole.ids) == self._world.rank).nonzero().flatten()
        return Scattered(whole.ids, whole.weight, rows, whole[rows])

    def whole(self, renders: Renders) -> Samples:
        """See `Sharing`. One sum of whole samples."""
        here = _scattered(renders)
        samples, sent = complete(self._world, here.samples, here.rows, len(here))
        self.sent += sent
        return samples

    def _owner_of(self, ids: Tensor) -> Tensor:
        """The rank `[n]` of each particle: owners have consecutive particles, and those without any come last."""
        return torch.bucketize(ids, self._firsts.to(ids.device), right=True) - 1


class EqualShares(WithOwners):
    """`all_to_all`: as `none`, but a step moves what an owner has above an equal share to ranks that have less."""

    def part(self, batch: Renders, num_views: int) -> tuple[Tensor, Samples]:
        """See `Sharing`. One collective, none where no rank has more than its share."""
        here = _scattered(batch)
        size, rank = self._world.size, self._world.rank
        holders = self._owner_of(here.ids[::num_views])
        trainers = equal_shares(holders, size)
        moves = holders != trainers
        if not moves.any():
            return here.rows, here.samples
        views = torch.arange(num_views, device=holders.device)

        def rows_of(particles: Tensor) -> Tensor:
            return (particles.nonzero() * num_views + views).flatten()

        def counts(ranks: Tensor) -> list[int]:
            return (torch.bincount(ranks, minlength=size) * num_views).tolist()

        given, taken = moves & (holders == rank), moves & (trainers == rank)
        stays = rows_of((holders == rank) & ~moves)
        give = rows_of(given)[_by_rank(trainers[given], num_views)]
        take = rows_of(taken)[_by_rank(holders[taken], num_views)]
        leaving = here[give].samples
        arrived = move(self._world, leaving, counts(trainers[given]), counts(holders[taken]))
        self.sent += sum(getattr(leaving, name).nbytes for name in vars(leaving))
        rows = torch.cat((stays, take))
        order = rows.argsort()
        return rows[order], Samples.cat([here[stays].samples, arrived])[order]


def equal_shares(holders: Tensor, size: int) -> Tensor:
    """The rank `[n]` that trains on each particle of a batch: its holder, as far as that has no more than the n / size,
    rounded up, that a rank gets at most; the others in their order fill the places that are left, rank by rank.

    holders: `[n]` the rank that has each particle. A pure function, so all ranks agree. No way of equal shares moves
    fewer particles.
    """
    most = -(-len(holders) // size)
    counts = torch.bincount(holders, minlength=size)
    order = holders.argsort(stable=True)
    number = torch.empty_like(order)  # of a particle among those of its holder
    number[order] = torch.arange(len(holders), device=holders.device) - (counts.cumsum(0) - counts)[holders[order]]
    above = number >= most
    places = torch.arange(size, device=holders.device).repeat_interleave((most - counts).clamp_min(0))
    trainers = holders.clone()
    trainers[above] = places[: int(above.sum())]
    return trainers


def share_renders(mode: Mode, world: World, num_particles: int) -> Sharing:
    """The way of that name. With one rank all ways are the same and nothing travels."""
    if world.size == 1:
        return Everywhere(world)
    match mode:
        case "all_gather":
            return Everywhere(world)
        case "none":
            return WithOwners(world, num_particles)
        case "all_to_all":
            return EqualShares(world, num_particles)
    raise ValueError(f"the exchange is {mode!r}; known are 'none', 'all_to_all' and 'all_gather'")


@dataclass(frozen=True)
class _Label:
    """What every rank learns of every render; see `Samples`."""

    ids: Tensor
    weight: Tensor


@dataclass(frozen=True)
class _Labelled:
    """Labels under way, and this rank's samples, sorted by particle."""

    labels: Pending[_Label]
    own: Samples

    def wait(self) -> Scattered:
        """See `Coming`."""
        union = self.labels.wait()
        rows = torch.isin(union.ids, self.own.ids).nonzero().flatten()
        return Scattered(union.ids, union.weight, rows, self.own)


def _by_rank(ranks: Tensor, num_views: int) -> Tensor:
    """The order of rows in which those of lower ranks come first; ranks: `[n]`, of particles with adjacent rows."""
    return ranks.repeat_interleave(num_views).argsort(stable=True)


def _whole(renders: Renders) -> Samples:
    assert isinstance(renders, Samples), "every rank has all renders"
    return renders


def _scattered(renders: Renders) -> Scattered:
    assert isinstance(renders, Scattered), "renders are with their owners"
    return renders
