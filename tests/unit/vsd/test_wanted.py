"""The message about a tensor that does not have the required dtype, shape or values."""

from __future__ import annotations

import pytest
import torch

from distvsd.errors import CheckpointError
from distvsd.vsd.wanted import Wanted, refuse_misfits

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("values", "limits", "fits"),
    [
        ([NAN, -INF], {}, True),
        ([0.0, INF], {"low": 0}, True),
        ([-0.0], {"low": 0}, True),
        ([1.0, NAN], {"low": 0}, False),
        ([1.0, -1e-30], {"low": 0}, False),
        ([3e38, -3e38], {"finite": True}, True),
        ([1.0, INF], {"finite": True}, False),
        ([-INF, 1.0], {"finite": True}, False),
        ([0.0, NAN], {"finite": True}, False),
        ([0.0, 2.0], {"low": 0, "high": 2}, True),
        ([0.0, 2.5], {"low": 0, "high": 2}, False),
        ([], {"low": 0, "high": 2, "finite": True}, True),
    ],
)
def test_values_are_held_against_their_limits(values: list[float], limits: dict[str, float], fits: bool) -> None:
    misfit = Wanted(torch.float32, (len(values),), **limits).misfit(torch.tensor(values))  # type: ignore[arg-type]
    assert (misfit is None) == fits


def test_counts_at_both_ends_of_64_bits_are_compared_exactly() -> None:
    wanted = Wanted(torch.int64, (2,), 0, 2**53)
    assert wanted.misfit(torch.tensor([0, 2**53])) is None
    for beyond in (2**53 + 1, 2**63 - 1, -1, -(2**63)):
        assert str(beyond) in str(wanted.misfit(torch.tensor([0, beyond])))


def test_the_refusal_names_each_tensor_what_it_is_what_it_must_be_and_what_to_do() -> None:
    wanted = {name: Wanted(torch.float32, (2,), low=0) for name in "abcd"}
    found = {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.int32), "c": torch.zeros(()), "other": torch.ones(9)}
    with pytest.raises(CheckpointError) as refusal:
        refuse_misfits("the file", wanted, found, "delete it")
    assert str(refusal.value) == (
        "the file: b is int32 [2], and must be float32 [2]; c is float32 [], and must be float32 [2]; "
        "d is missing, and must be float32 [2]; delete it"
    )
