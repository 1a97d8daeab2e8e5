"""Liveness: no failure of one rank leaves the others waiting. The error names the rank, its host and its phase.

These are whole trainings on forked ranks with real signals. tests/launchers/test_cluster_life.py does the same under
launchers.
"""

from __future__ import annotations

import ast
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distvsd.config import Config
from distvsd.errors import RankError
from distvsd.faults import injected
from distvsd.parallel.world import World
from distvsd.run.train import train
from distvsd.runtime.heartbeat import Heartbeat
from distvsd.testing.ranks import run_ranks
from tests.faults.test_durability import small_disk
from tests.small_run import small_config

ROOT = Path(__file__).parents[2]
Figure = Callable[[str], None]


def config(run: Path, prior: Path, **changes: Any) -> Config:
    own = {"parallel.numerics": "fast", "parallel.timeout_s": 60, "checkpoint.every": 1, "log.every": 1}
    return small_config(run, prior, **own | changes)


def train_with(world: World, run: Config, faults: str, folder: Path) -> None:
    """Trains under faults. Writes the final error and its time to a file, because some ranks do not return."""
    try:
        with injected(faults):
            train(run)
    except Exception as error:
        report = {"kind": type(error).__name__, "text": str(error), "time": time.time()}
        (folder / f"{world.rank}.json").write_text(json.dumps(report))
        raise


def reports(folder: Path, run: Config, faults: str, size: int) -> dict[int, dict[str, Any]]:
    """The reports of a failing run, by rank. A rank that was killed or stopped has none."""
    folder.mkdir()
    with pytest.raises(RankError):
        run_ranks(lambda world: train_with(world, run, faults, folder), size)
    return {int(path.stem): json.loads(path.read_text()) for path in folder.glob("*.json")}


def last_round_ended(run: Config) -> float:
    line = (Path(run.run.dir) / "metrics.jsonl").read_text().splitlines()[-1]
    time_s: float = json.loads(line)["time_s"]
    return time_s


@pytest.mark.guarantee("G19")
@pytest.mark.parametrize(
    ("point", "phase"), [("render", "render"), ("exchange", "exchange"), ("reduce", "score"), ("save.write", "watch")]
)
def test_a_dead_rank_ends_the_others_with_its_name(
    tmp_path: Path, prior: Path, figure: Figure, point: str, phase: str
) -> None:
    """If a rank is killed, the run ends on all ranks within seconds. Every error names the dead rank, its host, its
    process, the phase and the round."""
    run = config(tmp_path / "run", prior, **{"checkpoint.every": 3, "checkpoint.asynchronous": "false"})
    # Heartbeats are written every second. The sleep ensures that the last one holds the phase and the round.
    faults = f"sleep@{point}:rank=1:step=2:nth=1:ms=2500; kill@{point}:rank=1:step=2:nth=1"
    found = reports(tmp_path / "said", run, faults, 3)
    assert sorted(found) == [0, 2]
    for report in found.values():
        assert report["kind"] == "RankError"
        named = re.search(
            r"rank 1 \(host (\S+), pid \d+, last seen in phase '(\w+)' of round 2\) is gone", report["text"]
        )
        assert named, report["text"]
        assert "; rank 0 (" not in report["text"] and "; rank 2 (" not in report["text"], "a running rank is named"
        assert named.groups() == (os.uname().nodename, phase)
    # Far below the timeout of 60 s. The bound allows for a busy machine.
    seconds = max(report["time"] for report in found.values()) - last_round_ended(run) - 2.5
    assert seconds < 30
    status = json.loads((tmp_path / "run/STATUS.json").read_text())
    assert status["state"] == "failed" and "rank 1" in status["message"]
    figure(f"killed in {point}: the others ended at most {seconds:.1f} s later, timeout 60 s")


@pytest.mark.guarantee("G20")
def test_a_hung_rank_is_found_by_the_timeout_and_named(tmp_path: Path, prior: Path, figure: Figure) -> None:
    """A rank that hangs is detected after parallel.timeout_s. The error says that it is stopped, and in which phase."""
    run = config(tmp_path / "run", prior, **{"parallel.timeout_s": 4})
    # The sleep lets a heartbeat record the phase, as above.
    faults = "sleep@reduce:rank=2:step=2:nth=1:ms=2500; stop@reduce:rank=2:step=2:nth=1"
    found = reports(tmp_path / "said", run, faults, 3)
    assert sorted(found) == [0, 1]
    for report in found.values():
        assert report["kind"] == "RankError"
        assert re.search(
            r"rank 2 \(host \S+, pid \d+, last seen in phase 'score' of round 2\) is stopped", report["text"]
        )
    seconds = max(report["time"] for report in found.values()) - last_round_ended(run)
    assert 3.5 < seconds < 30
    figure(f"stopped: the others ended after {seconds:.1f} s, timeout 4 s")


@pytest.mark.guarantee("G19", "G20")
@pytest.mark.parametrize("lost", ["kill", "stop"])
@pytest.mark.parametrize("strategy", [{"strategy": "fsdp2"}, {"strategy": "deepspeed", "zero_stage": 2}])
def test_a_rank_lost_inside_another_librarys_collectives_is_named_too(
    tmp_path: Path, prior: Path, figure: Figure, request: pytest.FixtureRequest, strategy: dict[str, Any], lost: str
) -> None:
    """If FSDP2 or DeepSpeed waits for a rank that is dead or hangs, the run ends as under `flat`."""
    if strategy["strategy"] == "deepspeed":
        request.getfixturevalue("deepspeed")
    changes = {f"parallel.{name}": value for name, value in strategy.items()}
    run = config(tmp_path / "run", prior, **{"parallel.timeout_s": 8} | changes)
    # The sleep lets a heartbeat record the phase, as above.
    faults = f"sleep@reduce:rank=1:step=1:nth=1:ms=2500; {lost}@reduce:rank=1:step=1:nth=1"
    found = reports(tmp_path / "said", run, faults, 3)
    assert sorted(found) == [0, 2]
    for report in found.values():
        assert report["kind"] == "RankError"
        state = "gone" if lost == "kill" else "stopped"
        assert re.search(
            rf"rank 1 \(host \S+, pid \d+, last seen in phase 'score' of round 1\) is {state}", report["text"]
        )
    seconds = max(report["time"] for report in found.values()) - last_round_ended(run) - 2.5
    assert seconds < 30
    figure(f"{' '.join(map(str, strategy.values()))}, {lost}: the others ended after {seconds:.1f} s, timeout 8 s")


@pytest.mark.guarantee("G20")
@pytest.mark.parametrize(("point", "place"), [("load", "'start' of round 0"), ("reduce", "'score' of round 0")])
def test_a_rank_that_is_stopped_before_the_end_of_the_first_round_is_named_as_soon_as_later(
    tmp_path: Path, prior: Path, figure: Figure, point: str, place: str
) -> None:
    """Ranks may take very different times to load and to finish the first round. A rank that is stopped there is still
    named after parallel.timeout_s."""
    run = config(tmp_path / "run", prior, **{"parallel.timeout_s": 3})
    began = time.time()
    found = reports(tmp_path / "said", run, f"sleep@{point}:rank=1:ms=1500; stop@{point}:rank=1", 4)
    assert sorted(found) == [0, 2, 3]
    for report in found.values():
        assert report["kind"] == "RankError"
        named = re.search(r"rank 1 \(host \S+, pid \d+, last seen in phase (.+)\) is stopped", report["text"])
        assert named and named[1] == place, report["text"]
        assert not re.search(r"; rank [023] \(", report["text"]), "a running rank is named"
    seconds = max(report["time"] for report in found.values()) - began
    assert 4 < seconds < 45
    status = json.loads((tmp_path / "run/STATUS.json").read_text())
    assert status["state"] == "failed" and "rank 1" in status["message"]
    figure(f"stopped in {point} of the start: the others ended after {seconds - 1.5:.1f} s, timeout 3 s")


@pytest.mark.guarantee("G20")
def test_a_rank_that_loads_slowly_is_waited_for(tmp_path: Path, prior: Path) -> None:
    """A rank may take longer than parallel.timeout_s to load or to finish the first round. This does not end the run,
    because its heartbeats continue."""
    run = config(tmp_path / "run", prior, **{"parallel.timeout_s": 1, "schedule.rounds": 2})

    def slowly(world: World) -> int:
        with injected("sleep@load:rank=1:ms=2500; sleep@render:rank=0:step=0:nth=1:ms=2500"):
            return train(run)

    assert run_ranks(slowly, 3) == [0] * 3


@pytest.mark.guarantee("G20")
def test_a_rank_beats_on_when_the_disk_is_full(tmp_path: Path) -> None:
    """On a full disk a rank still updates its heartbeat, so it is not taken for a hung one."""
    with small_disk(tmp_path / "disk", 1):
        file, others = tmp_path / "disk/heartbeats/rank-00000.json", tmp_path / "disk/others"
        with Heartbeat(file.parent, 0, 1, 120.0, 0.01):
            with others.open("wb", buffering=0) as rest, pytest.raises(OSError, match="No space left"):
                while True:
                    rest.write(bytes(4096))
            seen = set()
            deadline = time.monotonic() + 20
            while len(seen) < 5:
                assert time.monotonic() < deadline, "the heartbeats have stopped"
                seen.add(json.loads(file.read_text())["beats"])
                time.sleep(0.01)


@pytest.mark.guarantee("G19", "G23")
def test_an_error_of_one_rank_alone_is_told_by_all(tmp_path: Path, prior: Path) -> None:
    """An exception on one rank between two collectives ends all ranks. The others repeat its message."""
    run = config(tmp_path / "run", prior)
    found = reports(tmp_path / "said", run, "eio@exchange:rank=1:step=1", 3)
    assert found[1]["kind"] == "OSError"
    for rank in (0, 2):
        assert found[rank]["kind"] == "RankError"
        assert "ended by itself: OSError: [Errno 5]" in found[rank]["text"]
        assert "rank 1 (host" in found[rank]["text"]


@pytest.mark.guarantee("G23")
def test_what_only_one_rank_can_see_is_one_error_on_all(tmp_path: Path, prior: Path) -> None:
    """If one rank cannot read the disk while a run resumes, every rank raises the same error without waiting for the
    timeout."""
    run = config(tmp_path / "run", prior, **{"schedule.rounds": 2})
    run_ranks(lambda world: train(run), 3)
    longer = config(tmp_path / "run", prior, **{"checkpoint.every": 1})

    def resume(world: World) -> list[str]:
        began = time.monotonic()
        try:
            with injected("eio@load.read:rank=1"):
                train(longer, resume="must")
        except Exception as error:
            assert time.monotonic() - began < 30, "the rank waited for the timeout"
            return [type(error).__name__, str(error)]
        return []

    said = run_ranks(resume, 3)
    assert said[0] == said[1] == said[2]
    assert said[0] and "Input/output error" in said[0][1]


@pytest.mark.guarantee("G23")
def test_no_rank_raises_alone_where_the_source_singles_one_out() -> None:
    """No code of the package raises on one rank only, except in functions that `agreed` runs."""
    wrong, functions = [], 0
    for path in sorted((ROOT / "distvsd").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        agreed_on = {
            argument.id
            for call in ast.walk(tree)
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in ("agreed", "_agreed")
            for argument in call.args
            if isinstance(argument, ast.Name)
        }
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            functions += 1
            if function.name not in agreed_on:
                wrong += [f"{path.relative_to(ROOT)}:{line}" for line in lonely_raises(function)]
    assert functions > 300
    assert not wrong, "raised on one rank while the others continue: " + ", ".join(wrong)


def lonely_raises(function: ast.FunctionDef) -> list[int]:
    """Lines of `raise` under a condition on the rank, or after the other ranks have returned."""
    found: list[int] = []
    others_left = False
    for statement in function.body:
        if others_left:
            found += raises_in(statement)
        if isinstance(statement, ast.If) and re.search(r"\brank\b *(==|!=)|is_first\b", ast.unparse(statement.test)):
            found += raises_in(statement)
            others_left |= any(isinstance(inner, ast.Return) for inner in statement.body)
    return found


def raises_in(statement: ast.stmt) -> list[int]:
    return [node.lineno for node in ast.walk(statement) if isinstance(node, ast.Raise)]


def test_lonely_raises_finds_raises_of_one_rank_only() -> None:
    source = (
        "def f(world):\n    if world.rank == 0:\n        raise ValueError\n    raise KeyError\n"
        "def g(world):\n    if world.rank != 0:\n        return\n    if bad:\n        raise ValueError\n"
        "def h(world):\n    if world.rank == 0:\n        write()\n    raise ValueError\n"
    )
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    assert [lonely_raises(function) for function in functions] == [[3], [9], []]


@pytest.mark.guarantee("G22")
def test_a_slow_rank_is_named(tmp_path: Path, prior: Path, figure: Figure, capfd: pytest.CaptureFixture[str]) -> None:
    """A rank whose work takes more than 1.5 times the median in three windows in a row is named once, with its host.
    metrics.jsonl holds the imbalance of every window."""
    run = config(tmp_path / "run", prior, **{"schedule.rounds": 5, "checkpoint.every": 0})

    def slowly(world: World) -> int:
        with injected("sleep@render:rank=2:ms=1500"):
            return train(run)

    assert run_ranks(slowly, 3) == [0] * 3
    warnings = [line for line in capfd.readouterr().err.splitlines() if "is a straggler" in line]
    assert len(warnings) == 1
    assert f"rank 2 of 3 on {os.uname().nodename} is a straggler" in warnings[0]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    imbalance = [line["imbalance"] for line in lines]
    assert len(imbalance) == 5 and min(imbalance) > 1.5
    figure(f"imbalance {min(imbalance):.1f} to {max(imbalance):.1f}, named after 3 windows")
