"""Preemption: after a signal to any rank, all ranks save and end, and the resumed run has the same result.

These are whole trainings on forked ranks with real signals. tests/launchers/test_cluster_life.py does the same under
launchers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distvsd.config import Config
from distvsd.faults import injected
from distvsd.parallel.world import World
from distvsd.run.contents import verify as verify_run
from distvsd.run.train import train
from distvsd.testing.ranks import run_ranks
from tests.small_run import small_config

SMOKE = Path(__file__).parents[2] / "configs/smoke.yaml"
Figure = Callable[[str], None]


def config(run: Path, prior: Path, every: int) -> Config:
    return small_config(run, prior, **{"checkpoint.every": every, "log.every": 1})


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, prior: Path) -> list[str]:
    """The digest of the same run without a signal."""
    run = config(tmp_path_factory.mktemp("alone") / "run", prior, 2)
    assert run_ranks(lambda world: train(run), 1) == [0]
    return verify_run(Path(run.run.dir), digest=True)


def trained(run: Config, size: int, faults: str = "") -> tuple[list[int], float]:
    """The exit codes of the ranks, and the time at which the last of them returned."""

    def on_a_rank(world: World) -> Any:
        with injected(faults):
            return [train(run), time.time()]

    results = run_ranks(on_a_rank, size)
    return [code for code, _ in results], max(left for _, left in results)


@pytest.mark.guarantee("G24")
@pytest.mark.parametrize(
    ("fault", "why", "size", "every"),
    [
        ("term@render:rank=1:step=1:nth=1", "another rank was told to stop", 2, 0),
        ("usr1@reduce:rank=0:step=1:nth=1", "SIGUSR1", 3, 0),
        # The checkpoint of the round before may still be in progress.
        ("term@round:rank=2:step=1", "another rank was told to stop", 3, 1),
        ("term@render:rank=0:step=1:nth=1; usr1@render:rank=1:step=1:nth=1", "SIGTERM", 2, 1),
    ],
)
def test_a_signal_to_one_rank_saves_the_round_and_the_run_goes_on_to_the_same_bits(
    tmp_path: Path, prior: Path, uninterrupted: list[str], figure: Figure, fault: str, why: str, size: int, every: int
) -> None:
    """After SIGTERM or SIGUSR1 to any rank, all ranks finish the round, save it, record it in STATUS.json and exit with
    3. The same call on another number of ranks ends with the bits of an uninterrupted run."""
    run = config(tmp_path / "run", prior, every)
    codes, left = trained(run, size, fault)
    assert codes == [3] * size
    status = json.loads((tmp_path / "run/STATUS.json").read_text())
    assert (status["state"], status["round"], status["rounds"]) == ("preempted", 2, 4)
    assert status["message"] == f"{why}; the same command continues the run"
    newest = max((tmp_path / "run/checkpoints").iterdir())
    assert newest.name == "step-00000002"
    verify_run(tmp_path / "run")
    assert not (tmp_path / "run/run.lock").exists() and not (tmp_path / "run/heartbeats").exists()
    first_round = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    figure(f"{size} ranks: at most {left - first_round['time_s']:.1f} s from the signal to the exit of all")

    assert trained(run, size % 3 + 1)[0] == [0] * (size % 3 + 1)
    assert verify_run(tmp_path / "run", digest=True) == uninterrupted
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2, 3, 4]
    assert json.loads((tmp_path / "run/STATUS.json").read_text())["state"] == "done"


@pytest.mark.guarantee("G24")
def test_a_signal_in_the_last_round_changes_nothing(tmp_path: Path, prior: Path, uninterrupted: list[str]) -> None:
    """A run that gets the signal in its last round finishes as done."""
    run = config(tmp_path / "run", prior, 2)
    assert trained(run, 2, "term@round:rank=1:step=3")[0] == [0, 0]
    assert json.loads((tmp_path / "run/STATUS.json").read_text())["state"] == "done"
    assert verify_run(tmp_path / "run", digest=True) == uninterrupted


@pytest.mark.guarantee("G24", "G9", "G16")
@pytest.mark.parametrize(("every", "size"), [(0, 1), (1, 2)])
def test_where_a_run_was_stopped_and_saved_does_not_change_what_a_particle_goes_back_to(
    tmp_path: Path, prior: Path, figure: Figure, every: int, size: int
) -> None:
    """A run is stopped and saved between two good states, and one of its particles fails later. The particle is
    restored to the same state as in a run that was not stopped and was saved in other rounds. Both runs end with the
    same bits."""
    streak = "nan@gradient:particle=1:step=3; nan@gradient:particle=1:step=4"
    # In these six rounds, good states are taken after rounds 2 and 4.
    limits = {"schedule.rounds": 6, "particles.health.max_bad": 2, "particles.health.good_every": 2, "log.every": 1}

    whole = small_config(tmp_path / "whole", prior, **limits, **{"checkpoint.every": 4})
    assert trained(whole, 2, streak)[0] == [0, 0]
    stopped = small_config(tmp_path / "stopped", prior, **limits, **{"checkpoint.every": every})
    assert trained(stopped, size, "term@render:rank=0:step=2:nth=1")[0] == [3] * size
    assert max((tmp_path / "stopped/checkpoints").iterdir()).name == "step-00000003"
    assert trained(stopped, 3 - size, streak)[0] == [0] * (3 - size)

    for run in ("whole", "stopped"):
        lines = (tmp_path / run / "health.jsonl").read_text().splitlines()
        events = [(line["round"], line["event"]) for line in map(json.loads, lines) if line["event"].startswith("went")]
        assert events == [(5, "went back to its last good state")]
    assert verify_run(tmp_path / "stopped", digest=True) == verify_run(tmp_path / "whole", digest=True)
    figure(f"saved after round 3, put back in round 5, checkpoint.every {every} against 4: the same bits")
