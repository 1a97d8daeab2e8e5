"""After kill -9 of a launcher at any time, no rank is left, and the next start continues the run."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distvsd.checkpoint.verify import verify_run
from distvsd.config import load_config
from distvsd.run.train import train
from tests.launchers.processes import Family, family
from tests.small_run import SMOKE, overrides

Figure = Callable[[str], None]
RANKS = ["-m", "distvsd.train", str(SMOKE)]
# A parent that starts ranks as a user's script would, and waits for them.
PARENT = """
import os, socket, subprocess, sys
size, present = int(sys.argv[1]), int(sys.argv[2])
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
started = [
    subprocess.Popen(
        [sys.executable, *sys.argv[3:]], env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    )
    for rank in range(present)
]
for rank in started:
    rank.wait()
"""
ENDLESS = {"parallel.numerics": "fast", "schedule.rounds": 100_000, "checkpoint.every": 20, "log.every": 1}
# An idle machine takes less than a second if there is nothing to save. A training also finishes its round and saves.
BOUND_S = 15.0

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these tests train on CPU ranks")


def torchrun(size: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), *RANKS]


def parent(size: int, present: int) -> list[str]:
    """Starts only the first `present` ranks of a world of `size`, so that they wait for the others."""
    return [sys.executable, "-c", PARENT, str(size), str(present), *RANKS]


def settings(run: Path, prior: Path) -> list[str]:
    return overrides(run, prior, **ENDLESS)


def started(size: int) -> Callable[[Family, Path], bool]:
    return lambda found, run: len(found.ranks()) == size


def training(found: Family, run: Path) -> bool:
    with_rounds = run / "metrics.jsonl"
    return with_rounds.is_file() and with_rounds.read_text().count("\n") >= 3


@pytest.mark.guarantee("G26")
@pytest.mark.parametrize(
    ("command", "moment", "later_s"),
    [
        pytest.param(torchrun(2), started(2), 0.0, id="torchrun, two ranks, at their start"),
        pytest.param(torchrun(2), started(2), 1.5, id="torchrun, two ranks, in their imports"),
        pytest.param(torchrun(1), training, 0.0, id="torchrun, one rank, in training and halted by SIGSTOP"),
        pytest.param(parent(1, 1), started(1), 0.3, id="a plain parent, one rank, in its imports"),
        pytest.param(parent(2, 1), started(1), 5.0, id="a plain parent, a rank that waits for another"),
    ],
)
def test_no_rank_outlives_its_launcher_whenever_that_is_killed(
    tmp_path: Path,
    prior: Path,
    figure: Figure,
    command: list[str],
    moment: Callable[[Family, Path], bool],
    later_s: float,
) -> None:
    """After kill -9 of the launcher while its ranks start, import, wait for each other or train, no process is left and
    the next start continues the run. The same holds for a world of one rank and for a rank that SIGSTOP has halted."""
    run = tmp_path / "run"
    with family([*command, *settings(run, prior)], tmp_path / "log") as found:
        found.until(lambda: moment(found, run))
        time.sleep(later_s)
        assert found.ranks(), f"the ranks have ended before the kill:\n{found.output}"
        if moment is training:  # no thread of a halted process can detect the kill
            for rank in found.ranks():
                os.kill(rank, signal.SIGSTOP)
        found.parent.kill()
        seconds = found.until(lambda: not found.living(), BOUND_S)
        assert "Traceback" not in found.output
    reached = json.loads((run / "STATUS.json").read_text()) if training(found, run) else {"state": "", "round": 0}
    if moment is training:
        assert reached["state"] == "preempted"
        verify_run(run)
    again = overrides(run, prior, **ENDLESS | {"schedule.rounds": reached["round"] + 1})
    assert train(load_config(SMOKE, again), resume="must" if (run / "config.yaml").exists() else "auto") == 0
    figure(f"0 orphans {seconds:.1f} s after the launcher was killed")


def test_a_run_that_a_person_started_outlives_the_shell_and_needs_no_stream(tmp_path: Path, prior: Path) -> None:
    """A shell starts the run with closed standard input, output and error and exits at once. The run continues to its
    end."""
    run = tmp_path / "run"
    settings = overrides(run, prior, **{"schedule.rounds": 2})
    command = ["/bin/sh", "-c", '"$@" 0<&- 1>&- 2>&- & exit 0', "sh", sys.executable, *RANKS, *settings]
    with family(command, tmp_path / "log") as found:
        assert found.parent.wait() == 0
        found.until(lambda: not found.living())
        assert json.loads((run / "STATUS.json").read_text())["state"] == "done"
