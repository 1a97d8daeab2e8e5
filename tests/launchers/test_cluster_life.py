"""Signals and failures as a cluster causes them, with real launchers.

Each test starts a launcher with two ranks and takes at least ten seconds. tests/faults has many more cases on forked
ranks.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from distvsd.config import load_config
from distvsd.run.contents import verify as verify_run
from distvsd.run.train import train
from tests.small_run import overrides

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "configs/smoke.yaml")
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
ENDLESS = {"parallel.numerics": "fast", "schedule.rounds": 100_000, "checkpoint.every": 20}
PATIENCE_S = 240.0  # for imports on a busy machine

Figure = Callable[[str], None]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these tests train on two CPU ranks")


def settings(run: Path, prior: Path, **changes: Any) -> list[str]:
    return overrides(run, prior, **{"schedule.rounds": 5, "checkpoint.every": 1, "log.every": 1} | changes)


class Job:
    """A launcher and the run that it trains. `output` is what all its processes have printed so far."""

    def __init__(self, launcher: list[str], run: Path, overrides: list[str], log: Path, **environment: str) -> None:
        launchers_own = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "ACCELERATE_", "TORCHELASTIC_", "PET_")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(launchers_own)}
        # An empty HF_HOME, so that the user's accelerate configuration does not affect the test.
        more = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HOME": str(log.with_suffix(".hf"))}
        self.run, self._log = run, log
        # A file and not a pipe: a worker that outlives its launcher would keep a pipe open.
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *launcher, "-m", "distvsd.train", SMOKE, *overrides],
                env=inherited | more | {"ACCELERATE_USE_CPU": "true"} | environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            )

    @property
    def output(self) -> str:
        return self._log.read_text()

    @property
    def status(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.run / "STATUS.json").read_text())
        return record

    def wait(self) -> int:
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the job does not end:\n{self.output}") from None

    def rounds(self) -> list[int]:
        return [line["round"] for line in self.metrics()]

    def metrics(self) -> list[dict[str, Any]]:
        try:
            # The last line may be incomplete.
            lines = (self.run / "metrics.jsonl").read_text().split("\n")[:-1]
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines]

    def until_trained(self, rounds: int) -> dict[int, int]:
        """Waits until that many rounds are logged. Returns the process id of every rank."""
        self.until(lambda: len(self.metrics()) >= rounds)
        beats = [json.loads(path.read_text()) for path in (self.run / "heartbeats").glob("rank-*.json")]
        assert sorted(beat["rank"] for beat in beats) == [0, 1]
        return {beat["rank"]: beat["pid"] for beat in beats}

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"the condition was not met in time:\n{self.output}"
            time.sleep(0.05)

    def newest(self) -> str:
        return max(path.name for path in (self.run / "checkpoints").iterdir() if path.name.startswith("step-"))


@contextmanager
def job(launcher: list[str], run: Path, overrides: list[str], name: str = "log", **environment: str) -> Iterator[Job]:
    """Starts a job. Kills its processes at the end, even if the test fails."""
    started = Job(launcher, run, overrides, run.with_name(name), **environment)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.wait()
        for path in (run / "heartbeats").glob("rank-*.json"):
            pid = json.loads(path.read_text())["pid"]
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    """Whether a process runs. A zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def is_preempted(job: Job, why: str) -> None:
    """Asserts that the run ended as preempted, saved its last round, and left no lock and no heartbeats."""
    status = job.status
    assert status["state"] == "preempted", f"{status}\n{job.output}"
    assert status["message"].startswith(why)
    assert job.newest() == f"step-{status['round']:08d}"
    assert status["round"] == job.rounds()[-1]
    verify_run(job.run)
    assert not (job.run / "run.lock").exists() and not (job.run / "heartbeats").exists()


@pytest.mark.guarantee("G21")
def test_a_killed_rank_is_restarted_and_the_run_finishes_by_itself(tmp_path: Path, prior: Path, figure: Figure) -> None:
    """Rank 0 is killed under accelerate launch --max_restarts. The launcher restarts all ranks with the same command
    line, and they continue from the newest checkpoint. The run ends with the bits of an undisturbed one."""
    alone, run = tmp_path / "alone", tmp_path / "run"
    assert train(load_config(SMOKE, settings(alone, prior))) == 0
    faults = "kill@round:rank=0:step=3:restart=0"
    with job([*ACCELERATE, "--max_restarts", "1"], run, settings(run, prior), DISTVSD_FAULTS=faults) as started:
        assert started.wait() == 0, started.output
        # The remaining rank names the dead one. Usually only rank 0 prints.
        assert re.search(r"error on rank 1: .*rank 0 \(host \S+, pid \d+, .*\) is gone", started.output)
        assert started.status["state"] == "done"
        assert verify_run(run, digest=True) == verify_run(alone, digest=True)
        assert started.rounds() == [1, 2, 3, 4, 5]
        printed = [int(number) for number in re.findall(r"round (\d)/5", started.output)]
        assert printed[:3] == [1, 2, 3] and printed[-1] == 5 and printed.count(4) == 1
        figure(f"{len(printed) - 5} of 3 rounds done again")


@pytest.mark.guarantee("G19")
def test_one_of_two_machines_dies(tmp_path: Path, prior: Path, figure: Figure) -> None:
    """All processes on one of two machines are killed at once, including its launcher. The rank on the other machine
    names the dead rank in its error and in STATUS.json, and its launcher ends within seconds."""
    run = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    node = ["torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    node += ["--rdzv-endpoint", address, "--rdzv-id", "castle"]
    overrides = settings(run, prior, **ENDLESS)
    with job(node, run, overrides, "one") as one, job(node, run, overrides, "two") as two:
        pids = one.until_trained(3)
        dies, lives = (one, two) if parent_of(pids[1]) == one.process.pid else (two, one)
        began = time.monotonic()
        os.kill(pids[1], signal.SIGKILL)
        dies.process.kill()
        assert lives.wait() != 0
        seconds = time.monotonic() - began
        assert seconds < 60
        assert lives.status["state"] == "failed"
        for text in (lives.status["message"], lives.output):
            assert re.search(
                rf"rank 1 \(host \S+, pid {pids[1]}, last seen in phase '\w+' of round \d+\) is gone", text
            )
        assert not is_alive(pids[0])
        figure(f"{seconds:.1f} s from the death of a machine to the end of the other's launcher")


@pytest.mark.guarantee("G20")
def test_a_hung_rank_does_not_keep_the_job(tmp_path: Path, prior: Path, figure: Figure) -> None:
    """If a rank hangs in a round, the others name it and end after parallel.timeout_s, and the launcher kills it."""
    run = tmp_path / "run"
    overrides = settings(run, prior, **ENDLESS, **{"parallel.timeout_s": 5})
    # By default torchrun waits 30 s between asking a process to end and killing it.
    with job(TORCHRUN, run, overrides, PET_SHUTDOWN_TIMEOUT="3") as started:
        pids = started.until_trained(3)
        began = time.monotonic()
        os.kill(pids[1], signal.SIGSTOP)
        assert started.wait() != 0
        seconds = time.monotonic() - began
        assert 4 < seconds < 60
        assert re.search(rf"rank 1 \(host \S+, pid {pids[1]}, .*\) is stopped", started.output)
        assert started.status["state"] == "failed" and "is stopped" in started.status["message"]
        # torchrun's summary shows that error too, and not only an exit code.
        assert re.search(r"Root Cause[\s\S]*RankError", started.output)
        assert not any(map(is_alive, pids.values()))
        figure(f"{seconds:.0f} s from the hang to the end of the job: timeout 5 s, torchrun's own 3 s")


@pytest.mark.guarantee("G24")
def test_sigterm_to_one_worker_under_torchrun(tmp_path: Path, prior: Path, figure: Figure) -> None:
    """After SIGTERM to one of torchrun's workers, both save the same round and exit with 3."""
    run = tmp_path / "run"
    with job(TORCHRUN, run, settings(run, prior, **ENDLESS)) as started:
        pids = started.until_trained(3)
        began = time.monotonic()
        os.kill(pids[1], signal.SIGTERM)
        assert started.wait() == 1  # torchrun exits with 1 if any worker does not exit with 0
        figure(f"{time.monotonic() - began:.1f} s from the signal to the end of the launcher")
        assert re.search(r"exitcode\s*:\s*3\b", started.output), started.output
        is_preempted(started, "another rank was told to stop")
        assert not any(map(is_alive, pids.values()))


@pytest.mark.guarantee("G24")
def test_sigusr1_to_the_accelerate_launcher(tmp_path: Path, prior: Path, figure: Figure) -> None:
    """SIGUSR1 to accelerate launch, as Slurm sends it before the time limit, is forwarded with PET_SIGNALS_TO_HANDLE.
    Both ranks save the same round and end."""
    run = tmp_path / "run"
    forwarded = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGUSR1"}
    with job(ACCELERATE, run, settings(run, prior, **ENDLESS), **forwarded) as started:
        pids = started.until_trained(3)
        began = time.monotonic()
        started.process.send_signal(signal.SIGUSR1)
        started.wait()
        figure(f"{time.monotonic() - began:.1f} s from the signal to the end of the launcher")
        is_preempted(started, "SIGUSR1")
        assert not any(map(is_alive, pids.values()))


@pytest.mark.guarantee("G26")
def test_killing_the_launcher_leaves_no_orphans(tmp_path: Path, prior: Path, figure: Figure) -> None:
    """After kill -9 of the launcher, the workers detect it, save the round and end."""
    run = tmp_path / "run"
    with job(TORCHRUN, run, settings(run, prior, **ENDLESS)) as started:
        pids = started.until_trained(3)
        began = time.monotonic()
        started.process.kill()
        started.until(lambda: not any(map(is_alive, pids.values())))
        seconds = time.monotonic() - began
        assert seconds < 60
        is_preempted(started, "the launcher died")
        figure(f"0 orphans {seconds:.1f} s after the launcher was killed")
