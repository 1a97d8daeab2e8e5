"""Telemetry never delays a step. Whatever wandb does, the run ends with the same bits and complete metrics."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distvsd.cli import main
from distvsd.config import Config
from distvsd.errors import RankError
from distvsd.faults import injected
from distvsd.parallel.world import World
from distvsd.run.contents import verify as verify_run
from distvsd.run.train import train
from distvsd.runtime.tracker import Tracker
from distvsd.testing.ranks import run_ranks
from tests.small_run import small_config

ROOT = Path(__file__).parents[2]
ROUNDS = 8

Figure = Callable[[str], None]
Calls = Callable[[str], list[dict[str, Any]]]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Replaces wandb by the fake of tests/fakes. Returns the recorded calls of one name."""
    path = tmp_path / "calls.jsonl"
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests/fakes"))
    monkeypatch.setenv("FAKE_WANDB_CALLS", str(path))
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)

    def called(name: str) -> list[dict[str, Any]]:
        lines = path.read_text().splitlines() if path.exists() else []
        return [call for call in map(json.loads, lines) if call["call"] == name]

    return called


def config(run: Path, prior: Path, **changes: Any) -> Config:
    own = {"particles.count": 2, "schedule.rounds": ROUNDS, "checkpoint.every": 4, "log.every": 1}
    own |= {"parallel.numerics": "fast", "log.wandb": "offline"}
    return small_config(run, prior, **own | changes)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rounds(run: Path) -> list[int]:
    return [line["round"] for line in lines(run / "metrics.jsonl")]


def seconds_a_round(run: Path) -> float:
    times = [line["time_s"] for line in lines(run / "metrics.jsonl")]
    return statistics.median(after - before for before, after in itertools.pairwise(times))


@pytest.fixture
def spent(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[float, float]]]:
    """Seconds of wall-clock time and of processor time that each call of Tracker.log takes in a step."""
    durations: list[tuple[float, float]] = []
    log = Tracker.log

    def timed(self: Tracker, *arguments: Any) -> None:
        clock, processor = time.perf_counter(), time.thread_time()
        log(self, *arguments)
        durations.append((time.perf_counter() - clock, time.thread_time() - processor))

    monkeypatch.setattr(Tracker, "log", timed)
    yield durations


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, prior: Path) -> Path:
    """The same run without wandb."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert train(config(run, prior, **{"log.wandb": "off"})) == 0
    return run


@pytest.mark.guarantee("G27")
@pytest.mark.parametrize("trouble", ["hang@init", "hang@log", "raise@init", "raise@log", "die@log", "raise@finish"])
def test_a_broken_wandb_costs_no_time_and_changes_no_bit(
    tmp_path: Path,
    prior: Path,
    alone: Path,
    calls: Calls,
    spent: list[tuple[float, float]],
    monkeypatch: pytest.MonkeyPatch,
    figure: Figure,
    trouble: str,
) -> None:
    """If wandb hangs, raises or exits while it is opened, used or closed, no step blocks or fails. The run ends in
    bounded time with the same bits, and metrics.jsonl has every round."""
    monkeypatch.setenv("FAKE_WANDB", trouble)
    if trouble == "hang@init":  # saves time; hang@log keeps the timeout of real runs
        close = Tracker.close
        monkeypatch.setattr(Tracker, "close", lambda self, outcome="done": close(self, 2.0, outcome))
    run = tmp_path / "run"
    began = time.monotonic()
    assert train(config(run, prior)) == 0
    whole = time.monotonic() - began
    assert rounds(run) == list(range(1, ROUNDS + 1))
    assert json.loads((run / "STATUS.json").read_text())["state"] == "done"
    assert verify_run(run, digest=True) == verify_run(alone, digest=True)
    assert len(spent) == ROUNDS
    clock, processor = (max(column) for column in zip(*spent, strict=True))
    assert processor < 0.02 and clock < 1.0
    assert whole < 20 + 60
    figure(
        f"{trouble}: at most {clock * 1e3:.2f} ms a round in the tracker, a round takes "
        f"{seconds_a_round(run) / seconds_a_round(alone):.2f} of its time without wandb"
    )
    assert calls("import")


@pytest.mark.guarantee("G27")
def test_only_rank_0_opens_wandb_and_pictures_and_the_table_arrive(tmp_path: Path, prior: Path, calls: Calls) -> None:
    """Only rank 0 opens wandb. It sends every logged round, the contact sheets and the table of particles."""
    run = config(tmp_path / "run", prior, **{"log.images_every": 4, "schedule.rounds": 4})
    run_ranks(lambda world: train(run), 2)
    assert len(calls("import")) == len(calls("init")) == len(calls("finish")) == 1
    logged = calls("log")
    steps = [call["step"] for call in logged]
    assert steps == sorted(steps) and [call["step"] for call in logged if "score_loss" in call["data"]] == [1, 2, 3, 4]
    assert calls("init")[0]["config"]["particles"]["count"] == 2
    keys = {key for call in logged for key in call["data"]}
    assert {"contact-sheet", "particles-000000-000000/contact-sheet", "particles"} <= keys
    (table,) = [call["data"]["particles"] for call in logged if "particles" in call["data"]]
    assert "quarantined" in table and "a red cube" in table


@pytest.mark.guarantee("G27", "G29")
def test_a_killed_and_resumed_run_has_every_round_once_and_is_one_run_in_wandb(
    tmp_path: Path, prior: Path, calls: Calls
) -> None:
    """After a kill and a resume, metrics.jsonl and health.jsonl have every line exactly once. wandb continues the same
    run."""
    run = config(tmp_path / "run", prior)
    unwell = "nan@gradient:particle=1:step=1; nan@gradient:particle=1:step=4"

    def begin(world: World) -> None:
        with injected(f"{unwell}; kill@round:rank=0:step=6"):
            train(run)

    def go_on(world: World) -> None:
        with injected(unwell):
            train(run)

    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(begin, 2)
    assert rounds(tmp_path / "run")[-1] == 6
    run_ranks(go_on, 2)
    assert rounds(tmp_path / "run") == list(range(1, ROUNDS + 1))
    events = [(line["round"], line["particle"]) for line in lines(tmp_path / "run/health.jsonl")]
    assert events == [(2, 1), (5, 1)]
    ids = {call["id"] for call in calls("init")}
    assert len(calls("init")) == 2 and len(ids) == 1


@pytest.mark.guarantee("G27")
def test_metrics_that_cannot_be_written_do_not_end_the_run(tmp_path: Path, prior: Path, alone: Path) -> None:
    """If a line of metrics.jsonl cannot be written, only that line is lost."""
    run = tmp_path / "run"
    with injected("enospc@telemetry:step=2; eio@telemetry:step=5"):
        assert train(config(run, prior, **{"log.wandb": "off"})) == 0
    assert rounds(run) == [1, 2, 4, 5, 7, 8]
    assert verify_run(run, digest=True) == verify_run(alone, digest=True)


@pytest.mark.guarantee("G27")
def test_a_run_without_wandb_is_replayed_into_it(
    tmp_path: Path, alone: Path, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    """`distvsd log RUN` sends every round of metrics.jsonl, the images and the evaluation to wandb after the run."""
    (alone / "evaluation.json").write_text(
        json.dumps(
            {
                "particles": 2,
                "label_accuracy": {"color": 1.0, "shape": 0.5},
                "diversity": {"vendi": 1.25},
                "particles_detail": [{"id": 0, "labels": {"color": "red"}, "empty": False, "diverged": False}],
            }
        )
    )
    (alone / "health.jsonl").write_text('{"round": 3, "particle": 1, "event": "gradient not finite"}\n')
    assert main(["log", str(alone), "--wandb", "offline"]) == 0
    logged = calls("log")
    sent = {call["step"]: call["data"] for call in logged if "score_loss" in call["data"]}
    for line in lines(alone / "metrics.jsonl"):
        assert sent[line["round"]] == {key: value for key, value in line.items() if value is not None}
    assert [call["step"] for call in logged[ROUNDS:]] == [ROUNDS + 1] * 2
    assert logged[ROUNDS]["data"] == {"contact-sheet": "Image(contact-sheet.png)"}
    assert "label/color" in logged[ROUNDS + 1]["data"]["particles"] and "not finite" in str(logged[ROUNDS + 1])
    assert calls("summary")[0]["numbers"] == {
        "evaluation/particles": 2,
        "evaluation/label_accuracy": 0.75,
        "evaluation/label_accuracy/color": 1.0,
        "evaluation/label_accuracy/shape": 0.5,
        "evaluation/diversity/vendi": 1.25,
    }
    assert capsys.readouterr().out == f"{ROUNDS + 3} notes sent\n"
    assert main(["log", str(alone), "--results-only"]) == 0
    assert len(calls("log")) == len(logged) + 2 and len({call["id"] for call in calls("init")}) == 1


@pytest.mark.guarantee("G27")
def test_a_replay_of_nothing_is_an_error(
    tmp_path: Path, alone: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`distvsd log` exists to use wandb, so a failure of wandb is an error. A run without metrics is an error too."""
    monkeypatch.setenv("FAKE_WANDB", "raise@init")
    assert main(["log", str(alone)]) == 1
    said = capsys.readouterr().err
    assert "fake wandb fails in init" in said and "wandb took nothing" in said
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text((alone / "config.yaml").read_text())
    assert main(["log", str(empty)]) == 1
    assert "has no line" in capsys.readouterr().err
