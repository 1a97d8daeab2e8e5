"""Scattered renders behave as whole ones, and equal shares are equal with as few moves as can be."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distvsd.score.replay import Replay
from distvsd.score.scattered import Scattered, joined
from distvsd.score.sharing import equal_shares
from distvsd.vsd.samples import Samples


def samples(count: int, first: float = 0.0) -> Samples:
    """Rows that can be told apart."""
    value = first + torch.arange(count).float()
    ids = torch.arange(count)
    latents, cameras = value[:, None, None, None].expand(count, 2, 1, 1).clone(), value[:, None].expand(count, 16)
    return Samples(latents, cameras, ids, ids, torch.ones(count))


def scattered(whole: Samples, rows: list[int]) -> Scattered:
    here = torch.tensor(rows, dtype=torch.int64)
    return Scattered(whole.ids, whole.weight, here, whole[here])


def same(one: Samples, other: Samples) -> bool:
    return all(torch.equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(Samples))


INDICES = [torch.tensor([3, 0, 3, 5]), slice(2, 5), torch.tensor([True, False, True, True, False, False])]


@pytest.mark.parametrize("index", INDICES)
def test_an_index_picks_what_it_picks_of_whole_renders(index: Tensor | slice) -> None:
    whole = samples(6)
    parts = [scattered(whole, rows)[index] for rows in ([0, 3], [1, 2, 4], [5], [])]
    expected = whole[index]
    for part in parts:
        assert torch.equal(part.ids, expected.ids) and torch.equal(part.weight, expected.weight)
        assert same(part.samples, expected[part.rows]) and part.shape == (2, 1, 1)
    assert sorted(torch.cat([part.rows for part in parts]).tolist()) == list(range(len(expected)))


def test_joined_parts_are_the_joined_whole() -> None:
    one, other = samples(3), samples(4, 10)
    found = joined([scattered(one, [1]), scattered(other, [0, 3])])
    assert isinstance(found, Scattered)
    whole = Samples.cat([one, other])
    assert found.rows.tolist() == [1, 3, 6] and same(found.samples, whole[found.rows])
    assert torch.equal(found.ids, whole.ids)


def test_the_agreed_weight_counts_and_not_that_of_the_owner() -> None:
    whole = samples(2)
    excluded = Scattered(whole.ids, torch.tensor([1.0, 0.0]), torch.tensor([0, 1]), whole)
    assert excluded.samples.weight.tolist() == [1.0, 0.0]


def test_a_replay_of_scattered_renders_draws_and_saves_what_a_whole_one_does() -> None:
    whole, parts = Replay(2, 2), [Replay(2, 2), Replay(2, 2)]
    for round in range(3):
        union = samples(6, 10 * round)
        union = Samples(union.latents, union.cameras, union.ids // 2, union.views, union.weight)
        union.weight[2:4] = 0
        whole.push(union, round)
        for part, rows in zip(parts, ([0, 1], [2, 3, 4, 5]), strict=True):
            part.push(scattered(union, rows), round)
    expected = whole.draw(5, 1, 3)
    drawn = [part.draw(5, 1, 3) for part in parts]
    assert isinstance(expected, Samples)
    for found in drawn:
        assert isinstance(found, Scattered) and torch.equal(found.ids, expected.ids)
        assert same(found.samples, expected[found.rows])
    assert sum(len(found.rows) for found in drawn if isinstance(found, Scattered)) == len(expected)
    restored = Replay(2, 2)
    restored.load_state(whole.state(), lambda rows: scattered(rows, [0, 1]))
    found = restored.draw(5, 1, 3)
    assert isinstance(found, Scattered) and same(found.samples, expected[found.rows])


@given(
    st.integers(1, 6).flatmap(lambda size: st.tuples(st.just(size), st.lists(st.integers(0, size - 1), max_size=30)))
)
def test_no_rank_gets_more_than_its_share_and_only_what_is_above_moves(case: tuple[int, list[int]]) -> None:
    size, owned = case
    holders = torch.tensor(owned, dtype=torch.int64)
    trainers = equal_shares(holders, size)
    most = -(-len(owned) // size)
    counts = torch.bincount(trainers, minlength=size)
    assert len(trainers) == len(owned) and int(counts.sum()) == len(owned) and len(counts) == size
    assert int(counts.max()) <= most
    above = (torch.bincount(holders, minlength=size) - most).clamp_min(0)
    assert int((trainers != holders).sum()) == int(above.sum())  # no way of shares that small can move fewer
