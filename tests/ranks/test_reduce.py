"""The gradient reduction on real ranks: the union's gradient, and in exact mode the same bits for every world size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from distvsd.parallel import reduce
from distvsd.parallel.assign import owners
from distvsd.parallel.reduce import Flag, Reduced, reduce_gradients
from distvsd.parallel.world import World
from distvsd.testing.ranks import run_ranks
from distvsd.vsd.rng import Purpose, normal

LENGTH = 4001


def vectors() -> Tensor:
    """Seven micro-batches whose elements span fifteen orders of magnitude, so that the order of a float sum matters."""
    scale = 10.0 ** torch.linspace(-12, 3, LENGTH)
    return normal(0, Purpose.NOISE, list(range(7)), 0, (LENGTH,)) * scale


def losses() -> Tensor:
    return torch.tensor([[0.1 * (i + 1), 1.0] for i in range(7)], dtype=torch.float64)


def reduce_share(world: World, numerics: Any, assignment: list[list[int]] | None = None) -> Reduced:
    mine = (assignment or owners(7, world.size))[world.rank]
    return reduce_gradients(world, (vectors()[i] for i in mine), LENGTH, numerics, losses()[mine])


def fingerprint(reduced: Reduced) -> str:
    return hashlib.sha256(reduced.gradient.numpy().tobytes() + reduced.sums.numpy().tobytes()).hexdigest()


@pytest.mark.guarantee("G10")
def test_exact_has_the_same_bits_for_every_world_size() -> None:
    """The exact sum of gradients has the same bits on 1 to 4 ranks, for every distribution of the addends."""
    prints = {fingerprint(result) for size in (1, 2, 3, 4) for result in run_ranks(reduce_share, size, "exact")}
    prints.add(fingerprint(run_ranks(reduce_share, 2, "exact", [[6, 3, 0], [5, 1, 4, 2]])[0]))
    prints.add(fingerprint(run_ranks(reduce_share, 2, "exact", [[], [0, 1, 2, 3, 4, 5, 6]])[0]))
    assert len(prints) == 1


@pytest.mark.parametrize("numerics", ["fast", "exact"])
def test_sums_that_are_written_while_the_vectors_are_computed_are_whole(numerics: str) -> None:
    def share(world: World) -> Reduced:
        mine, sums = owners(7, world.size)[world.rank], losses()
        written = torch.zeros_like(sums[mine])

        def computed() -> Iterator[Tensor]:
            for row, i in enumerate(mine):
                written[row] = sums[i]
                yield vectors()[i]

        return reduce_gradients(world, computed(), LENGTH, numerics, written)  # type: ignore[arg-type]

    assert run_ranks(share, 2)[0].sums.tolist() == pytest.approx([2.8, 7.0], rel=1e-6)


def test_exact_is_the_correctly_rounded_sum() -> None:
    result = run_ranks(reduce_share, 3, "exact")[0]
    # A float64 sum of seven float32 values is accurate to 2^-50 of the largest addend, and is then rounded once.
    expected = vectors().double().sum(0)
    assert (result.gradient.double() - expected).abs().div(expected.abs()).max() <= 2.0**-24
    assert result.sums.tolist() == pytest.approx([2.8, 7.0], rel=1e-15)
    assert result.flags == 0 and result.usable


@pytest.mark.guarantee("G13")
@pytest.mark.parametrize("counts", [(3, 1), (0, 4), (2, 1, 1)])
def test_fast_is_the_gradient_of_the_union_up_to_rounding(counts: tuple[int, ...]) -> None:
    """The fast sum of gradients equals the sum over all samples, up to rounding."""
    ends = [sum(counts[: rank + 1]) for rank in range(len(counts))]
    assignment = [list(range(end - count, end)) for end, count in zip(ends, counts, strict=True)]
    results = run_ranks(reduce_share, len(counts), "fast", assignment)
    addends = vectors()[:4].double()
    for result in results:
        assert torch.equal(result.gradient, results[0].gradient), "ranks must not drift apart"
        assert ((result.gradient - addends.sum(0)).abs() <= 4 * 2.0**-24 * addends.abs().sum(0)).all()
        assert result.sums.tolist() == pytest.approx([1.0, 4.0], rel=1e-6)
        assert result.flags == 0 and result.usable


@pytest.mark.guarantee("G17")
@pytest.mark.parametrize("numerics", ["fast", "exact"])
def test_a_bad_number_on_one_rank_is_known_to_all(numerics: Any) -> None:
    """A gradient that is not finite on one rank makes the reduction unusable on all."""

    def spoil(world: World, where: str, bad: float) -> list[Any]:
        gradient = torch.tensor([1.0, bad if world.rank == 1 and where == "gradient" else 2.0])
        loss = torch.tensor([bad if world.rank == 1 and where == "loss" else 1.0], dtype=torch.float64)
        reduced = reduce_gradients(world, [torch.ones(2), gradient], 2, numerics, loss)
        return [reduced.flags, reduced.usable]

    cases = [(where, float(bad)) for where in ("gradient", "loss") for bad in ("nan", "inf", "-inf")]
    results = run_ranks(lambda world: [spoil(world, *case) for case in cases], 2)
    assert results == [[[Flag.NONFINITE, False]] * len(cases)] * 2


def test_exact_reports_what_does_not_fit_instead_of_wrapping(monkeypatch: pytest.MonkeyPatch) -> None:
    def overflow(world: World, value: float, repeats: int) -> list[Any]:
        many = (torch.tensor([value]) for _ in range(repeats))
        reduced = reduce_gradients(world, many, 1, "exact", torch.zeros(1, dtype=torch.float64))
        return [reduced.flags, float(reduced.gradient)]

    largest = 2.0**20 - 2.0**-4  # the largest float32 below the limit
    assert run_ranks(overflow, 2, 2.0**20, 1)[0][0] == Flag.OVERFLOW
    assert largest * 2.0**reduce.COARSE_BITS * reduce.MAX_ADDENDS < 2.0**63
    # Rounding leaves half a coarse unit, in fine units: 2^-31 * 2^80.
    assert 2.0 ** (reduce.FINE_BITS - reduce.COARSE_BITS - 1) * reduce.MAX_ADDENDS < 2.0**63
    # MAX_ADDENDS additions take seconds. A smaller limit shows that the addends of all ranks are counted together.
    monkeypatch.setattr(reduce, "MAX_ADDENDS", 8)
    assert run_ranks(overflow, 2, largest, 4) == [[0, 8 * largest]] * 2
    assert run_ranks(overflow, 2, largest, 5)[0][0] == Flag.OVERFLOW


@pytest.mark.parametrize("numerics", ["fast", "exact"])
def test_a_reduction_takes_one_collective(numerics: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = reduce.all_reduce_sum_

    def counted(world: World, tensor: Tensor) -> Tensor:
        calls.append(tensor.numel())
        return real(world, tensor)

    monkeypatch.setattr(reduce, "all_reduce_sum_", counted)

    def count(world: World) -> int:
        reduce_share(world, numerics)
        return len(calls)

    assert run_ranks(count, 2) == [1, 1]
