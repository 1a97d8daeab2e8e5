"""A launcher's store outlives its workers, so a start must ignore what an earlier one left there."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from distvsd.errors import RankError
from distvsd.parallel.opening import agreed_name


def start(store: dist.Store, order: list[int]) -> list[str]:
    """The name that each rank agrees on, where the ranks arrive in this order, some time apart."""

    def arrive(rank: int) -> str:
        time.sleep(0.15 * order.index(rank))
        return agreed_name(store, rank, len(order), 30.0)

    with ThreadPoolExecutor(len(order)) as ranks:
        return list(ranks.map(arrive, range(len(order))))


@pytest.mark.guarantee("G21")
def test_each_start_agrees_on_a_name_of_its_own_in_one_store() -> None:
    """Restarted ranks agree on a new name in any order of arrival, whatever an earlier start left in the launcher's
    store."""
    store = dist.HashStore()
    names = [start(store, order) for order in ([0, 1, 2], [1, 2, 0], [2, 0, 1])]
    assert [len(set(of_one_start)) for of_one_start in names] == [1, 1, 1]
    assert len({name for of_one_start in names for name in of_one_start}) == 3


def test_ranks_that_do_not_come_are_named() -> None:
    store = dist.HashStore()
    with pytest.raises(RankError, match=r"^ranks 1, 2 of 3 "):
        agreed_name(store, 0, 3, 0.2)
    # Rank 0 of that start is gone: the name that it left is not enough.
    with pytest.raises(RankError, match=r"^rank 0 of 3 "):
        agreed_name(store, 1, 3, 0.3)
