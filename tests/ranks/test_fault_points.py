"""The fault points in collectives."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from distvsd.errors import RankError
from distvsd.faults import injected
from distvsd.parallel.exchange import Exchange
from distvsd.parallel.reduce import Flag, reduce_gradients
from distvsd.parallel.world import World
from distvsd.testing.ranks import run_ranks


@dataclass(frozen=True)
class Rows:
    ids: Tensor
    latents: Tensor


@pytest.mark.parametrize("numerics", ["fast", "exact"])
def test_a_poisoned_gradient_of_one_rank_is_seen_by_all_and_only_in_its_turn(numerics: str) -> None:
    def reduce(world: World) -> list[list[bool]]:
        found = []
        with injected("nan@reduce:rank=1:nth=2"):
            for _ in range(3):
                vectors = [torch.ones(4), torch.ones(4)]
                reduced = reduce_gradients(world, vectors, 4, numerics, torch.zeros(2, 1, dtype=torch.float64))  # type: ignore[arg-type]
                whole = bool((reduced.gradient == 2.0 * world.size).all())
                found.append([reduced.usable, bool(reduced.flags & Flag.NONFINITE), whole and reduced.usable])
        return found

    # The fault is in the second vector of rank 1, which belongs to its first reduction.
    assert run_ranks(reduce, 3) == [[[False, True, False], [True, False, True], [True, False, True]]] * 3


def test_an_error_before_the_gather_of_one_rank_ends_the_others() -> None:
    def gather(world: World) -> None:
        rows = Rows(torch.tensor([world.rank]), torch.zeros(1, 3))
        with injected("eio@exchange:rank=1:nth=2"):
            for _ in range(2):
                assert Exchange(world, [1, 1]).start(rows).wait().ids.tolist() == [0, 1]

    with pytest.raises(RankError, match=r"^rank 1 of 2 failed[\s\S]*Input/output error[\s\S]*rank 0 of 2 lost"):
        run_ranks(gather, 2)
