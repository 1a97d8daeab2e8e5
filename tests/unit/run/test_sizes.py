"""Sizes of calls that are chosen by measurement: the search, what ranks agree on, what a resume takes over."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from distvsd.checkpoint.reader import newest
from distvsd.config import Config, load_config
from distvsd.errors import ConfigError
from distvsd.parallel.world import World
from distvsd.run.build import build_run
from distvsd.run.sizes import BETTER, ROUNDS, Search
from distvsd.run.train import train
from distvsd.testing.ranks import run_ranks
from tests.small_run import SMOKE, small_config

FIRST = 4 * ROUNDS  # enough for every size of three particles
ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def searched(seconds: dict[int, float], most: int, grows_to: int = 10**9) -> tuple[int, list[int]]:
    """The answer of a search and the sizes that it tried. grows_to: from that size on the memory is full."""
    search, tried = Search(most), []
    while not search.done:
        assert len(tried) < 64, "the search does not end"
        tried.append(search.size)
        search.note(seconds[search.size], search.size < grows_to)
    return search.size, tried


def test_it_goes_up_while_larger_is_faster() -> None:
    assert searched({8: 8.0, 16: 6.0, 32: 5.0, 64: 5.5}, 64) == (32, [8, 16, 32, 64])


def test_it_goes_down_where_larger_is_not_faster() -> None:
    assert searched({8: 8.0, 16: 9.0, 4: 6.0, 2: 5.0, 1: 7.0}, 64) == (2, [8, 16, 4, 2, 1])


def test_it_stays_where_neither_helps() -> None:
    assert searched({8: 8.0, 16: 8.0, 4: 8.0}, 64) == (8, [8, 16, 4])


def test_it_begins_with_all_where_there_are_few_and_ends_with_all_where_that_is_no_power_of_two() -> None:
    assert searched({3: 1.0, 2: 2.0}, 3) == (3, [3, 2])
    assert searched({6: 3.0, 4: 2.0, 2: 2.5}, 6) == (4, [6, 4, 2])
    assert searched({8: 3.0, 11: 2.0}, 11) == (11, [8, 11])
    assert searched({1: 1.0}, 1) == (1, [1])


def test_it_does_not_grow_where_the_memory_would_be_full_and_leaves_a_size_that_did_not_fit() -> None:
    assert searched({8: 8.0, 16: 4.0, 32: 1.0}, 64, grows_to=16) == (16, [8, 16])
    assert searched({8: 8.0, 16: math.inf, 4: 9.0}, 64) == (8, [8, 16, 4])
    assert searched({8: math.inf, 4: 9.0, 2: 10.0}, 8) == (4, [8, 4, 2])


@given(st.lists(st.floats(0.1, 10), min_size=8, max_size=8), st.integers(1, 128))
def test_it_always_ends_with_the_fastest_of_what_it_tried(seconds: list[float], most: int) -> None:
    at = {2**power: value for power, value in enumerate(seconds)} | {most: seconds[-1]}
    size, tried = searched(at, most)
    assert at[size] == min(at[each] for each in tried) and len(set(tried)) == len(tried)


@given(st.integers(0, 7), st.floats(1.05, 3))
def test_it_finds_the_best_of_a_curve_with_one_valley(power: int, steepness: float) -> None:
    assert steepness > 1 / BETTER
    at = {2**each: steepness ** abs(each - power) for each in range(8)}
    assert searched(at, 128)[0] == 2**power


def auto(run: Path, prior: Path, **changes: Any) -> Config:
    own = {"particles.micro_batch": "auto", "score.micro_batch": "auto", "parallel.numerics": "fast"}
    return small_config(run, prior, **own | {"particles.count": 3, "schedule.rounds": FIRST} | changes)


def noted(config: Config) -> Any:
    checkpoint = newest(Path(config.run.dir) / "checkpoints")
    assert checkpoint is not None
    return checkpoint.manifest.more.get("sizes")


def test_all_ranks_take_the_same_sizes_and_a_resume_takes_them_over(tmp_path: Path, prior: Path) -> None:
    def sizes_of(world: World, rounds: int) -> tuple[int, list[int]]:
        """Trains, or goes on; then the sizes of a run that begins with what the checkpoint notes."""
        config = auto(tmp_path / "run", prior, **{"schedule.rounds": rounds})
        train(config, resume="auto" if rounds == FIRST else "must")
        run = build_run(config, world, lambda done: False)
        assert run.sizes.measuring and run.training is not None
        run.sizes.load_state(noted(config))
        assert not run.sizes.measuring
        return run.training.micro_batch, [len(group.own) for group in run.ensemble.store.lease(0)]

    first = run_ranks(lambda world: sizes_of(world, FIRST), 2)
    chosen = noted(auto(tmp_path / "run", prior))
    assert set(chosen) == {"particles", "samples"} and set(chosen.values()) <= {1, 2}
    assert [samples for samples, _ in first] == [chosen["samples"]] * 2
    assert [groups[0] for _, groups in first] == [chosen["particles"], 1]
    assert run_ranks(lambda world: sizes_of(world, FIRST + 2), 2) == first
    assert noted(auto(tmp_path / "run", prior)) == chosen


@pytest.mark.parametrize(
    "changes",
    [
        {"particles.micro_batch": 2, "score.micro_batch": 0},
        {"parallel.numerics": "exact"},
        {"parallel.strategy": "ddp"},
    ],
    ids=["given", "exact", "spread"],
)
def test_nothing_is_measured_where_the_sizes_are_given(tmp_path: Path, prior: Path, changes: dict[str, Any]) -> None:
    run = build_run(auto(tmp_path / "run", prior, **changes), ALONE, lambda done: False)
    assert not run.sizes.measuring and run.sizes.state() == {}


@pytest.mark.parametrize("state", [{}, {"particles": "2"}, {"particles": -1, "samples": True}, [], None])
def test_what_is_no_size_is_measured_again(tmp_path: Path, prior: Path, state: Any) -> None:
    run = build_run(auto(tmp_path / "run", prior), ALONE, lambda done: False)
    run.sizes.load_state(state)
    assert run.sizes.measuring and run.sizes.state() == {}


@pytest.mark.parametrize("value", ["aut", "-1", "1.5", "true"])
def test_a_size_that_is_neither_a_number_nor_auto_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"particles.micro_batch.*allowed: an integer at least 0.*or auto"):
        load_config(SMOKE, [f"particles.micro_batch={value}"])


class _Kept:
    """A tensor that a graph keeps; counts while it lives."""

    alive = most = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        _Kept.alive += tensor.nbytes
        _Kept.most = max(_Kept.most, _Kept.alive)

    def __del__(self) -> None:
        _Kept.alive -= self.tensor.nbytes


def test_a_round_holds_the_graph_of_one_group(tmp_path: Path, prior: Path) -> None:
    """What the graphs keep at most does not grow with the number of particles."""
    most = {}
    for count in (2, 8):
        changes = {"particles.count": count, "particles.micro_batch": 2, "parallel.numerics": "fast"}
        run = build_run(small_config(tmp_path / "run", prior, **changes), ALONE, lambda done: False)
        _Kept.alive = _Kept.most = 0
        with saved_tensors_hooks(_Kept, lambda kept: kept.tensor):
            for views in run.ensemble.render(0, 16):
                samples = run.loop.encode(views, 16)
                run.ensemble.update(views, samples.latents, torch.ones_like(samples.latents), 0)
                del views, samples
        most[count] = _Kept.most
        assert sorted(run.ensemble.finish(0).healthy) == list(range(count))
    assert 0 < most[8] <= 1.01 * most[2]
