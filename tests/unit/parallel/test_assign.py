"""The assignment: every particle has one owner, shares are contiguous and even, idle ranks are legal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distvsd.parallel.assign import owners


def test_first_ranks_own_one_more() -> None:
    assert owners(7, 3) == [[0, 1, 2], [3, 4], [5, 6]]


def test_ranks_beyond_the_particles_own_none() -> None:
    assert owners(3, 4) == [[0], [1], [2], []]


@given(num_particles=st.integers(0, 300), world_size=st.integers(1, 40))
def test_owners_partition_the_particles_in_order_and_evenly(num_particles: int, world_size: int) -> None:
    assignment = owners(num_particles, world_size)
    assert len(assignment) == world_size
    assert [particle for ids in assignment for particle in ids] == list(range(num_particles))
    lengths = [len(ids) for ids in assignment]
    assert max(lengths) - min(lengths) <= 1 and lengths == sorted(lengths, reverse=True)


def test_no_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one rank"):
        owners(7, 0)
