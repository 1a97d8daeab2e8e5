"""Which exchange of renders `auto` takes, and the closed formulas of what each sends, against enumeration and draws."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import pytest

from distvsd.config import Config
from distvsd.parallel.assign import owners
from distvsd.plan.exchange import chosen_mode, exchanges

SAMPLE = 4 * (4 * 64 * 64 + 21)


def config(count: int, exchange: Any = "auto", **score: Any) -> Config:
    default = Config()
    return replace(
        default,
        particles=replace(default.particles, count=count),
        score=replace(default.score, **score),
        parallel=replace(default.parallel, exchange=exchange),
    )


def row(run: Config, world: int, mode: str) -> dict[str, Any]:
    return next(row for row in exchanges(run, world, SAMPLE) if row["mode"] == mode)


@pytest.mark.parametrize(
    ("count", "world", "score", "expected"),
    [
        (8, 1, {}, "none"),
        (8, 4, {}, "none"),  # every rank has its equal share already
        (7, 3, {}, "none"),
        (2, 5, {}, "none"),
        (7, 3, {"steps_per_round": 4}, "none"),
        (64, 8, {"steps_per_round": 4, "batch_size": 16}, "all_to_all"),
        (64, 8, {"replay_share": 0.25}, "all_to_all"),
        # Fifty steps move more renders between two ranks than one gather does.
        (8, 2, {"steps_per_round": 50, "replay_share": 0.25}, "all_gather"),
        (2, 3, {"batch_size": 1}, "none"),  # one particle a step: nobody can have more than a share
    ],
)
def test_auto_takes_equal_shares_with_the_fewest_renders_sent(
    count: int, world: int, score: dict[str, Any], expected: str
) -> None:
    assert chosen_mode(config(count, **score), world) == expected


@pytest.mark.parametrize("mode", ["none", "all_to_all", "all_gather"])
def test_a_named_exchange_is_taken(mode: str) -> None:
    run = config(64, mode, batch_size=16)
    assert chosen_mode(run, 8) == mode
    assert [row["mode"] for row in exchanges(run, 8, SAMPLE) if row["chosen"]] == [mode]


def moved(count: int, world: int, batch: tuple[int, ...]) -> int:
    """Particles of a batch above the equal share of the rank that owns them."""
    most = -(-len(batch) // world)
    return sum(max(0, sum(particle in own for particle in batch) - most) for own in map(set, owners(count, world)))


@pytest.mark.parametrize(
    ("count", "world", "dealt", "replayed"), [(7, 3, 4, 1), (6, 2, 3, 3), (5, 4, 5, 2), (3, 5, 2, 1)]
)
def test_what_equal_shares_move_is_the_mean_over_all_batches(count: int, world: int, dealt: int, replayed: int) -> None:
    batches = [
        fresh + old for fresh in combinations(range(count), dealt) for old in product(range(count), repeat=replayed)
    ]
    mean = sum(moved(count, world, batch) for batch in batches) / len(batches)
    run = config(count, batch_size=dealt, replay_share=replayed / (dealt + replayed), steps_per_round=1000)
    sent = row(run, world, "all_to_all")["round"] - row(run, world, "none")["round"]
    assert sent == pytest.approx(1000 * mean * SAMPLE, rel=1e-6)


def test_what_equal_shares_move_of_many_particles_is_the_mean_of_draws() -> None:
    """2000 particles a rank, where the number of a rank's dealt ones is taken as normal; 400 draws, 5 deviations."""
    count, world, dealt = 8000, 4, 2000
    draws = random.Random(0)
    found = [moved(count, world, tuple(draws.sample(range(count), dealt))) for _ in range(400)]
    mean = sum(found) / len(found)
    deviation = (sum((one - mean) ** 2 for one in found) / len(found)) ** 0.5 / len(found) ** 0.5
    run = config(count, batch_size=dealt)
    sent = (row(run, world, "all_to_all")["round"] - row(run, world, "none")["round"]) / SAMPLE
    assert abs(sent - mean) < 5 * deviation


def test_the_busiest_rank_trains_on_an_equal_share_or_on_its_own() -> None:
    dealt = config(64, batch_size=16, steps_per_round=4)
    shares = {mode: row(dealt, 8, mode)["trained"] for mode in ("none", "all_to_all", "all_gather")}
    assert shares["all_to_all"] == shares["all_gather"] == 4 * 2
    assert 4 * 2 < shares["none"] <= 4 * 8
    everything = config(7, steps_per_round=2)
    assert {row(everything, 3, mode)["trained"] for mode in ("none", "all_to_all", "all_gather")} == {2 * 3}


def test_one_rank_and_a_run_without_a_score_network_exchange_nothing() -> None:
    assert {row["round"] for row in exchanges(config(8, replay_share=0.5), 1, SAMPLE)} == {0}
    run = config(8)
    assert exchanges(replace(run, objective=replace(run.objective, kind="sds")), 4, SAMPLE) == []


def test_the_lag_and_a_save_send_more_where_renders_stay_with_their_owners() -> None:
    run = config(100, replay_share=0.5, replay_rounds=3)
    none = row(run, 4, "none")
    # Ring sums of 64 current and 64 old renders, and of three rounds of 100.
    assert none["log"] == 2 * 4 * (2 * 3 * 64 * SAMPLE // 4)
    assert none["save"] == 3 * 4 * (2 * 3 * 100 * SAMPLE // 4)
    assert row(run, 4, "all_gather")["log"] == row(run, 4, "all_gather")["save"] == 0
