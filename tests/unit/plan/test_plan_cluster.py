"""The cost of a failure, compared with a simulated run that fails at every moment."""

from __future__ import annotations

import json
from bisect import bisect
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from distvsd.cli import main
from distvsd.config import Config
from distvsd.plan.cluster import Assumptions, disk_times, failures
from distvsd.plan.text import ASSUMED, draw, duration
from distvsd.run.planned import plan_run

ROUNDS, MOMENTS = 4000, 40_000
QUICKSTART = str(Path(__file__).parents[3] / "configs/quickstart.yaml")


def config(every: int, asynchronous: bool, **schedule: Any) -> Config:
    default = Config()
    return replace(
        default,
        schedule=replace(default.schedule, rounds=schedule.get("rounds", ROUNDS)),
        checkpoint=replace(default.checkpoint, every=every, asynchronous=asynchronous),
        parallel=replace(default.parallel, timeout_s=40.0),
    )


def played(every: int, asynchronous: bool, round_s: float, write_s: float) -> tuple[list[float], list[float]]:
    """Rounds and seconds lost by failures at moments spread evenly over a long stretch of a run.

    The simulation goes round by round, as the trainer does. A background save that has ended is published after a
    round. A save that is due waits until the one before has ended; in the foreground the rounds also wait for the save
    itself. Seconds count from the moment of the published state, without the pause of a foreground save.
    """
    clock = 0.0
    work = [(0.0, 0)]  # points of a piecewise linear curve: the clock, the rounds done by then
    published = [(0.0, 0, 0.0)]  # the clock, the rounds that are safe, the moment of their state
    writing: tuple[int, float, float] | None = None  # the rounds, when it will be written, the moment of their state
    for completed in range(1, ROUNDS + 1):
        clock += round_s
        work.append((clock, completed))
        if writing is not None and writing[1] <= clock + 1e-9:
            published.append((clock, writing[0], writing[2]))
            writing = None
        if completed % every:
            continue
        if writing is not None:
            clock = writing[1]
            published.append((clock, writing[0], writing[2]))
        if asynchronous:
            writing = completed, clock + write_s, clock
        else:
            clock += write_s
            published.append((clock, completed, clock))
        work.append((clock, completed))
    rounds, seconds = [], []
    first, last = published[3][0], published[-3][0]
    for index in range(MOMENTS):
        now = first + (last - first) * (index + 0.5) / MOMENTS
        _, safe, since = published[bisect(published, (now, ROUNDS, now)) - 1]
        corner = bisect(work, (now, ROUNDS)) - 1
        (before, done), (after, more) = work[corner], work[corner + 1]
        rounds.append(done + (more - done) * (now - before) / (after - before) - safe)
        seconds.append(now - since)
    return rounds, seconds


@pytest.mark.parametrize(
    ("asynchronous", "write_s"), [(False, 30.0), (True, 0.5), (True, 30.0), (True, 79.0), (True, 130.0)]
)
def test_a_failure_loses_what_a_run_that_is_played_through_loses(asynchronous: bool, write_s: float) -> None:
    """Saves every 40 rounds of 2 s: in the foreground; and in the background, lasting part of a round, 15 rounds,
    almost 40 rounds, and more than 40 rounds, so that the rounds wait."""
    every, round_s = 40, 2.0
    run, assumed = config(every, asynchronous), Assumptions(round_s=round_s, restart_s=100.0, node_mtbf_days=10)
    times = disk_times(run, int(write_s * 1e9 / 2), 5_000_000_000, assumed)
    assert times["write_s"] == write_s and times["load_s"] == 5.0
    assert times["stall_s"] == (write_s if not asynchronous else max(0.0, write_s - every * round_s))
    found = failures(run, 4, times, assumed)
    rounds, seconds = played(every, asynchronous, round_s, write_s)
    again_s = 40 + 100 + 5  # the timeout that notices the failure, the restart, the loading
    assert found["rounds_average"] == pytest.approx(sum(rounds) / len(rounds), rel=0.01)
    assert found["rounds_most"] == pytest.approx(max(rounds), abs=0.2)
    assert found["minutes_average"] * 60 - again_s == pytest.approx(sum(seconds) / len(seconds), rel=0.01)
    assert found["minutes_most"] * 60 - again_s == pytest.approx(max(seconds), abs=0.5)
    # 4 nodes, each fails once in 10 days.
    assert found["a_day"] == 0.4
    assert found["share"] == pytest.approx(0.4 * found["minutes_average"] / 1440)
    assert found["hours"] == pytest.approx((ROUNDS * round_s + ROUNDS / every * times["stall_s"]) / 3600)
    assert found["hours_with_failures"] == pytest.approx(found["hours"] / (1 - found["share"]))


@pytest.mark.parametrize("every", [0, 10**6])
def test_a_run_that_is_saved_only_at_its_end_can_lose_all_of_it(every: int) -> None:
    run, assumed = config(every, asynchronous=False, rounds=100), Assumptions()
    found = failures(run, 1, disk_times(run, 0, 0, assumed), assumed)
    assert (found["rounds_average"], found["rounds_most"]) == (50, 100)


def test_more_failures_than_time_between_them_never_end() -> None:
    run, assumed = config(1000, asynchronous=True), Assumptions(node_mtbf_days=1)
    found = failures(run, 1000, disk_times(run, 10**9, 10**9, assumed), assumed)
    assert found["share"] > 1 and found["hours_with_failures"] is None


def test_what_depends_on_an_unknown_size_is_unknown_and_the_rest_is_not(tmp_path: Path) -> None:
    default = Config()
    plan = plan_run(replace(default, prior=replace(default.prior, path=str(tmp_path / "nowhere"))), nodes=50)
    assert plan["checkpoint"]["write_s"] is None and plan["wire"] == {"rank": None, "all": None}
    assert plan["failures"]["a_day"] == 0.5 and plan["failures"]["share"] is None
    assert "what each loses is unknown" in draw(plan)


def test_every_assumption_is_printed_with_its_value_and_the_option_that_changes_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ASSUMED.keys() == asdict(Assumptions()).keys()
    options = {name: 7.5 + number for number, name in enumerate(ASSUMED)}
    given = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["plan", QUICKSTART, "--json", *given]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["assumed"] == options
    lines = draw(plan).splitlines()
    for name, value in options.items():
        (line,) = (line for line in lines if line.startswith(f"  --{name.replace('_', '-')} "))
        assert f" {value:g} " in line
    assert main(["plan", QUICKSTART]) == 0
    assert "a node fails once in 100 days" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--round-s=0", "--disk-mb-s=-1", "--node-mtbf-days=inf", "--restart-s=soon"])
def test_an_assumption_that_is_no_positive_number_is_wrong_usage(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", QUICKSTART, option])
    assert caught.value.code == 2
    assert f"argument {option.partition('=')[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.94, "59.9 s"), (90, "1.5 min"), (9000, "2.5 h"), (None, "unknown")]
)
def test_durations_are_read_in_the_unit_that_fits(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text
