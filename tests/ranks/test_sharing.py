"""Every exchange of renders trains the same adapter, and sends what the plan says."""

from __future__ import annotations

import json
import socket
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from distvsd.config import Config
from distvsd.faults import begin_round, injected
from distvsd.parallel.world import World
from distvsd.run.build import build_run
from distvsd.run.contents import verify
from distvsd.run.planned import plan_run
from distvsd.run.train import train
from distvsd.score.sharing import EqualShares, Everywhere, Mode, WithOwners
from distvsd.testing.ranks import run_ranks
from tests.small_run import small_config

MODES = get_args(Mode)
ROUNDS = 4
STRUCK = 4  # a particle that does not move in the third round
# Seven particles: uneven shards on two and three ranks. Dealt batches and replayed renders, so that shares are uneven.
DEALT = {
    "particles.count": 7,
    "particles.views": 2,
    "score.steps_per_round": 2,
    "score.batch_size": 8,
    "score.replay_share": 0.25,
    "score.replay_rounds": 2,
    "score.learning_rate": 1e-3,
    "score.warmup": 3,
    "schedule.rounds": ROUNDS,
}
State = Mapping[str, Mapping[str, Tensor]]


def sharing(folder: Path, prior: Path, mode: str, **changes: Any) -> Config:
    return small_config(folder, prior, **(DEALT | {"parallel.exchange": mode} | changes))


def digests(config: Config) -> dict[str, str]:
    lines = verify(Path(config.run.dir), digest=True)
    return dict(line.rsplit(" ", 1) for line in lines if len(line.split()[-1]) == 64)


def struck(config: Config, size: int, resume: Any = "auto") -> None:
    """Trains with a particle whose gradient is not finite in one round."""

    def run(world: World) -> int:
        with injected(f"nan@gradient:particle={STRUCK}:step=2"):
            return train(config, resume=resume)

    assert run_ranks(run, size) == [0] * size


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, prior: Path) -> dict[str, str]:
    """The digests of a run on one rank, where nothing is exchanged."""
    config = sharing(tmp_path_factory.mktemp("one"), prior, "all_gather")
    struck(config, 1)
    found = digests(config)
    assert len(found) >= 7 + 4
    return found


@pytest.mark.guarantee("G10")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [2, 3])
def test_every_exchange_gives_the_same_bits_in_exact_numerics(
    tmp_path: Path, prior: Path, reference: dict[str, str], mode: str, size: int
) -> None:
    """Particles, adapter, optimisers and replay are those of one rank bit for bit, with uneven shards, dealt batches,
    replayed renders and a particle that is left out of a round."""
    config = sharing(tmp_path, prior, mode)
    struck(config, size)
    assert digests(config) == reference


@pytest.mark.guarantee("G11")
def test_a_run_goes_on_under_another_exchange_and_number_of_ranks(
    tmp_path: Path, prior: Path, reference: dict[str, str]
) -> None:
    """Two rounds without an exchange on three ranks, one of equal shares on two, one of all renders on three."""
    for mode, rounds, size in (("none", 2, 3), ("all_to_all", 3, 2), ("all_gather", 4, 3)):
        config = sharing(tmp_path / "run", prior, mode, **{"schedule.rounds": rounds})
        struck(config, size, resume="must" if rounds > 2 else "never")
    assert digests(config) == reference


def test_ranks_without_particles_take_part(tmp_path: Path, prior: Path) -> None:
    found = []
    for number, (mode, size) in enumerate((("all_gather", 1), ("none", 3), ("all_to_all", 3))):
        config = sharing(tmp_path / str(number), prior, mode, **{"particles.count": 2, "schedule.rounds": 3})
        assert run_ranks(lambda world, c=config: train(c), size) == [0] * size
        found.append(digests(config))
    assert found[0] == found[1] == found[2]


def trained(world: World, config: Config) -> tuple[State, list[float | None]]:
    """The state of the score network after five rounds of given renders, and the lag of each round."""
    run = build_run(config, world, lambda done: False)
    training, lags = run.training, []
    assert training is not None, "the run has a score network"
    for parameter in training.score.trainable.values():  # else the first factor's gradient is zero
        parameter.data += 0.01
    for step in range(5):
        begin_round(step)
        resolution = run.loop.resolution(step)
        samples = run.loop.encode(run.ensemble.render(step, resolution), resolution).detached()
        union = run.loop.exchange(samples, step).wait()
        union = run.loop.exclude(union, [STRUCK] if step == 2 and STRUCK in run.ensemble.ids else [])
        lags.append(training.lag(union, step))
        training.round(union, step)
    return training.state(), lags


STRATEGIES = ({}, {"parallel.strategy": "ddp"}, {"parallel.strategy": "fsdp2"})


@pytest.mark.guarantee("G13")
@pytest.mark.parametrize("changes", STRATEGIES, ids=["flat", "ddp", "fsdp2"])
def test_every_exchange_trains_the_same_adapter_in_fast_numerics(
    tmp_path: Path, prior: Path, figure: Callable[[str], None], changes: dict[str, Any]
) -> None:
    """The adapter and its moments agree to 1e-6 with those of one rank, also where a network call is collective."""
    fast = {"parallel.numerics": "fast"} | changes
    expected, lags = run_ranks(trained, 1, sharing(tmp_path, prior, "auto", **fast))[0]
    far = {}
    for mode in MODES:
        for size in (2, 3):
            for state, found in run_ranks(trained, size, sharing(tmp_path, prior, mode, **fast)):
                far[mode, size] = max(far.get((mode, size), 0.0), distance(state, expected))
                assert found[0] is None and found[1:] == pytest.approx(lags[1:], abs=1e-5)
    assert max(far.values()) < 1e-6
    figure(", ".join(f"{mode} on {size} ranks: {value:.1e}" for (mode, size), value in far.items()))


def distance(one: State, other: State) -> float:
    """The largest difference between two states, which must have the same names."""
    assert {file: set(tensors) for file, tensors in one.items()} == {file: set(t) for file, t in other.items()}
    pairs = [(one[file][name], other[file][name]) for file in one for name in one[file]]
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel())
