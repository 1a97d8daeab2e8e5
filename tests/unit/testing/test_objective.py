"""`check_objective` accepts the built-in objectives, and names the rule that a broken one violates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from distvsd.testing import check_objective
from distvsd.vsd.objectives import ESD, SDS, VSD, Draws, Predictions, weighted_difference


@pytest.mark.parametrize("objective", [VSD(), SDS(), ESD(0.0), ESD(0.3), ESD(1.0)], ids=repr)
def test_the_objectives_of_the_house_pass(objective: Any) -> None:
    check_objective(objective)


@dataclass
class Broken:
    """VSD with one thing wrong."""

    wrong: str
    calls: list[int] = field(default_factory=list)
    needs = VSD.needs

    def gradient(self, predictions: Predictions, draws: Draws) -> Tensor:
        gradient = VSD().gradient(predictions, draws)
        match self.wrong:
            case "shape":
                return gradient.sum(1)
            case "dtype":
                return gradient.double()
            case "infinite":
                return gradient / (gradient * 0)
            case "graph":
                return gradient * torch.ones((), requires_grad=True)
            case "in place":
                predictions.of("guided").mul_(2)
            case "state":
                self.calls.append(0)
                return gradient * len(self.calls)
            case "rows":
                return gradient - gradient.mean()
            case "unused":
                return weighted_difference(predictions.of("guided"), draws.noise, draws)
        return gradient


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ("shape", "must be"),
        ("dtype", "float32"),
        ("infinite", "finite"),
        ("graph", "graph"),
        ("in place", "in place"),
        ("state", "state"),
        ("rows", "other particles"),
        ("unused", "'score'"),
    ],
)
def test_what_is_wrong_is_named(wrong: str, word: str) -> None:
    with pytest.raises(AssertionError, match=word):
        check_objective(Broken(wrong))


def test_a_need_that_does_not_exist_is_named() -> None:
    class Wishful(VSD):
        needs = frozenset({"guided", "depth"})  # type: ignore[assignment]

    with pytest.raises(AssertionError, match="depth"):
        check_objective(Wishful())
