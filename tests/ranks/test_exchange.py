"""The exchange on real ranks gives the same union in the same order for every assignment of particles to ranks."""

from __future__ import annotations

import pytest
import torch

from distvsd.errors import RankError
from distvsd.parallel.assign import owners
from distvsd.parallel.exchange import Exchange, slice_for
from distvsd.parallel.world import World
from distvsd.testing.ranks import run_ranks
from distvsd.vsd.rng import Purpose, normal
from distvsd.vsd.samples import Samples

SHAPE = (4, 3, 2)


def samples_of(ids: list[int]) -> Samples:
    """Values that depend on (particle, slot) only. Among them are a NaN with a payload, -0, -inf and a large int64."""
    latents = normal(0, Purpose.NOISE, ids, 0, SHAPE)
    if ids:
        latents[:, 0, 0, 0] = torch.tensor(0x7FC12345, dtype=torch.int32).view(torch.float32)
        latents[:, 0, 0, 1] = torch.tensor(-0.0)
        latents[:, 0, 1, 0] = float("-inf")
    particles = torch.tensor(ids, dtype=torch.int64)
    return Samples(latents, normal(0, Purpose.CAMERA, ids, 0, (16,)), particles, particles % 3 - 2**40, 1.0 * particles)


def words(samples: Samples) -> list[torch.Tensor]:
    return [x.contiguous().view(torch.int32) for x in vars(samples).values()]


@pytest.mark.parametrize("counts", [(3,), (1,), (0, 1), (3, 1), (0, 4), (2, 0, 3)])
def test_every_rank_gets_the_union_bit_for_bit(counts: tuple[int, ...]) -> None:
    ids = list(range(100, 100 + sum(counts)))

    def gather(world: World) -> Samples:
        start = sum(counts[: world.rank])
        mine = samples_of(ids[start : start + counts[world.rank]])
        pending = Exchange(world, counts).start(mine)
        union = pending.wait()
        assert pending.wait() is union, "a second wait must not gather again"
        return union

    for union in run_ranks(gather, len(counts)):
        assert union.latents.shape == (len(ids), *SHAPE)
        assert union.ids.dtype == torch.int64 and union.weight.dtype == torch.float32
        for got, expected in zip(words(union), words(samples_of(ids)), strict=True):
            assert torch.equal(got, expected)


def test_the_order_is_by_particle_then_as_given_whoever_owns_it() -> None:
    def gather(world: World) -> list[list[float]]:
        ids = [[5, 2, 5], [9, 0]][world.rank] if world.size == 2 else [5, 2, 5, 9, 0]
        slots = [[0.0, 1.0, 2.0], [3.0, 4.0]][world.rank] if world.size == 2 else [0.0, 1.0, 2.0, 3.0, 4.0]
        mine = samples_of(ids)
        mine = Samples(mine.latents, mine.cameras, mine.ids, mine.views, torch.tensor(slots))
        union = Exchange(world, [3, 2] if world.size == 2 else [5]).start(mine).wait()
        return [union.ids.tolist(), union.weight.tolist()]

    expected = [[0, 2, 5, 5, 9], [4.0, 1.0, 0.0, 2.0, 3.0]]
    assert run_ranks(gather, 1) == [expected]
    assert run_ranks(gather, 2) == [expected] * 2


def test_work_between_start_and_wait_and_a_change_of_shape_do_no_harm() -> None:
    def gather(world: World) -> bool:
        exchange = Exchange(world, [2, 1])
        mine = samples_of([[0, 1], [2]][world.rank])
        pending = exchange.start(mine)
        mine.latents.add_(1)  # the exchange copied the samples at its start
        smaller = exchange.start(Samples(mine.latents[..., :1], mine.cameras, mine.ids, mine.views, mine.weight))
        first, second = pending.wait(), smaller.wait()
        same = torch.equal(first.latents.view(torch.int32), samples_of([0, 1, 2]).latents.view(torch.int32))
        return same and second.latents.shape == (3, 4, 3, 1)

    assert run_ranks(gather, 2) == [True, True]


def test_the_union_has_no_graph() -> None:
    def gather(world: World) -> bool:
        mine = samples_of([world.rank])
        leaf = mine.latents.requires_grad_()
        union = Exchange(world, [1] * world.size).start(
            Samples(leaf * 2, mine.cameras, mine.ids, mine.views, mine.weight)
        )
        return union.wait().latents.requires_grad

    assert run_ranks(gather, 1) == [False]
    assert run_ranks(gather, 2) == [False, False]


def test_more_ranks_than_particles_still_cover_the_union_with_their_slices() -> None:
    def gather(world: World) -> list[int]:
        assignment = owners(3, world.size)
        union = Exchange(world, [len(ids) for ids in assignment]).start(samples_of(assignment[world.rank])).wait()
        return union[slice_for(world, len(union))].ids.tolist()

    assert run_ranks(gather, 4) == [[0], [1], [2], []]


def test_a_rank_that_gives_other_rows_than_assigned_is_named() -> None:
    def gather(world: World) -> None:
        Exchange(world, [1, 1]).start(samples_of([0, 1] if world.rank else [0])).wait()

    with pytest.raises(RankError, match=r"rank 1 .*'latents': 2.* 1\n"):
        run_ranks(gather, 2)
