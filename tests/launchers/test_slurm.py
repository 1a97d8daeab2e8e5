"""The jobs of launch/slurm, run as Slurm runs them, but without Slurm.

Each test runs a copy of the script in the folder of the submission, with Slurm's variables and with fakes of srun and
scontrol on the path (tests/fakes/slurm). Two tests train on two ranks through the real launchers. In the others the
launcher is a shell script that writes a STATUS.json, as the ranks would.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from distvsd import errors
from distvsd.run.contents import verify as verify_run
from distvsd.runtime.status import State, write_status
from tests.small_run import overrides

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "launch/slurm").glob("*.sbatch"))
PATIENCE_S = 240.0  # for imports on a busy machine

Figure = Callable[[str], None]

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="these tests train on two CPU ranks")


class Slurm:
    """A Slurm job: its script, its variables and its requests to scontrol."""

    def __init__(self, home: Path, nodes: int, **environment: str) -> None:
        self.home, self.id = home, free_job_id()
        self.state = home / "slurm"
        self.programs = home / "bin"
        for folder in (self.state, self.programs):
            folder.mkdir()
        launchers_own = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "ACCELERATE_", "TORCHELASTIC_", "PET_", "SLURM_")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(launchers_own)}
        path = [str(self.programs), str(ROOT / "tests/fakes/slurm"), str(Path(sys.executable).parent)]
        slurm = {"SLURM_JOB_ID": self.id, "SLURM_JOB_NODELIST": f"node[1-{nodes}]", "SLURM_JOB_NUM_NODES": str(nodes)}
        slurm |= {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_NODEID": "0", "SLURM_PROCID": "0", "DISTVSD_RANKS": "1"}
        more = {"PATH": os.pathsep.join([*path, os.environ["PATH"]]), "FAKE_SLURM": str(self.state)}
        # An empty HF_HOME, so that the user's accelerate configuration does not affect the test.
        more |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HOME": str(home / "hf")}
        self.environment = inherited | slurm | more | environment

    def start(self, job: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        # Slurm runs a copy from its spool folder, and not as a login shell.
        script = self.home / "spool" / "slurm_script"
        script.parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / "launch/slurm" / f"{job}.sbatch", script)
        with (self.home / "output").open("a") as output:
            return subprocess.Popen(
                ["/bin/sh", str(script), *arguments],
                env=self.environment | environment,
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def run(self, job: str, *arguments: str, **environment: str) -> int:
        return self.start(job, *arguments, **environment).wait(PATIENCE_S)

    @property
    def output(self) -> str:
        return (self.home / "output").read_text()

    @property
    def requeued(self) -> list[str]:
        asked = self.state / "requeued"
        return asked.read_text().split() if asked.exists() else []

    def tasks(self) -> list[int]:
        """The process ids of the launchers, one per node."""
        return [int(pid) for pid in (self.state / "tasks").read_text().split()]

    def program(self, name: str, *lines: str) -> None:
        """Replaces a launcher by a script of these shell lines, which first records its arguments."""
        path = self.programs / name
        note = f"printf '%s\\n' \"$@\" >'{self.state}/{name}'"
        path.write_text("\n".join(["#!/bin/sh", note, *lines, ""]))
        path.chmod(0o755)

    def arguments(self, name: str) -> list[str]:
        return (self.state / name).read_text().splitlines()


def free_job_id() -> str:
    """A job id whose port is free. The jobs derive the port from the id."""
    while True:
        job_id = random.SystemRandom().randrange(1_000_000, 9_000_000)
        with socket.socket() as probe:
            try:
                probe.bind(("", 10000 + job_id % 20000))
            except OSError:
                continue
            return str(job_id)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path, 1)


MESSAGE = 'a "message": with "state": "done" in it'


def ends_with(slurm: Slurm, run: Path, state: State | None, round: int, code: int, message: str = MESSAGE) -> None:
    """Replaces the launcher by one that leaves this STATUS.json and exits with this code. state: None for no file."""
    leave = ""
    if state is not None:
        run.mkdir(exist_ok=True)
        write_status(slurm.state / "next", state, round, 10, message)
        leave = f"cp '{slurm.state}/next' '{run}/STATUS.json'"
    slurm.program("accelerate", leave, f"exit {code}")


def left_before(run: Path, state: State, round: int) -> None:
    run.mkdir()
    write_status(run / "STATUS.json", state, round, 10)


@pytest.mark.guarantee("G25")
@pytest.mark.parametrize(
    ("state", "code", "is_requeued", "exit_code"),
    [
        ("done", 0, False, 0),
        ("done", 1, False, 0),  # the launcher failed after the run was saved
        ("preempted", 1, True, 0),
        ("failed", 1, True, 0),
        ("running", 137, True, 0),  # no process was left to record the failure
        (None, 1, False, 1),  # refused at the start; the same command would be refused again
    ],
)
def test_what_the_run_says_decides_whether_the_job_is_queued_again(
    slurm: Slurm, run: Path, state: State | None, code: int, is_requeued: bool, exit_code: int
) -> None:
    """STATUS.json, and not the launcher's exit code, decides whether a Slurm job is requeued. Preempted, failed and
    interrupted runs are requeued. Finished runs and runs that were refused at the start are not."""
    ends_with(slurm, run, state, 4, code)
    assert slurm.run("train", "config.yaml", f"run.dir={run}") == exit_code, slurm.output
    assert slurm.requeued == ([slurm.id] if is_requeued else []), slurm.output


@pytest.mark.parametrize("kind", [kind for kind in vars(errors).values() if isinstance(kind, type)])
def test_a_run_that_was_refused_is_not_queued_again(slurm: Slurm, run: Path, kind: type[errors.DistvsdError]) -> None:
    """Errors of usage end a process with 2. A launcher exits with 1 for all errors, so the message in STATUS.json
    decides."""
    ends_with(slurm, run, "failed", 4, 1, f"{kind.__name__}: there is no folder 'PriorError: x'")
    slurm.run("train", "config.yaml", f"run.dir={run}")
    assert slurm.requeued == ([] if kind.exit_code == 2 else [slurm.id]), slurm.output


@pytest.mark.guarantee("G25")
def test_a_run_that_fails_again_and_again_is_given_up(slurm: Slurm, run: Path) -> None:
    """After three requeues without a newly saved round the job ends. A newly saved round resets the count, so that a
    long run survives any number of node failures."""
    ends_with(slurm, run, "failed", 4, 1)
    codes = [slurm.run("train", "config.yaml", f"run.dir={run}") for _ in range(4)]
    assert codes == [0, 0, 0, 1] and len(slurm.requeued) == 3
    assert "given up" in slurm.output
    ends_with(slurm, run, "failed", 5, 1)
    assert slurm.run("train", "config.yaml", f"run.dir={run}") == 0 and len(slurm.requeued) == 4


def test_a_status_of_an_earlier_start_is_not_taken_for_that_of_this_one(slurm: Slurm, run: Path) -> None:
    """If an old status counted, a job whose nodes cannot start the launcher would be requeued forever, as preempted."""
    left_before(run, "preempted", 4)
    (run / "slurm-failures").write_text("0 4\n")
    slurm.program("accelerate", "exit 127")
    codes = [slurm.run("train", "config.yaml", f"run.dir={run}") for _ in range(4)]
    assert codes == [0, 0, 0, 1] and len(slurm.requeued) == 3
    assert "unchanged" in slurm.output


def test_a_finished_run_that_is_started_with_something_else_is_not_queued_again(slurm: Slurm, run: Path) -> None:
    left_before(run, "done", 10)
    slurm.program("accelerate", "exit 1")
    assert slurm.run("train", "config.yaml", f"run.dir={run}") == 1
    assert slurm.requeued == [] and "nothing was begun" in slurm.output


def test_a_cancelled_job_is_not_brought_back(slurm: Slurm, run: Path) -> None:
    """After scancel the ranks save and end as at a time limit. Only Slurm knows the difference."""
    (slurm.state / "job-state").write_text("CANCELLED\n")
    ends_with(slurm, run, "preempted", 4, 1)
    assert slurm.run("train", "config.yaml", f"run.dir={run}") == 1
    assert slurm.requeued == [] and "the job is CANCELLED; not requeued" in slurm.output


def test_sigterm_to_the_job_lets_the_ranks_save_and_ends_it(slurm: Slurm, run: Path) -> None:
    """The job must not forward SIGTERM to srun, because srun would then kill its tasks."""
    run.mkdir()
    write_status(slurm.state / "next", "preempted", 4, 10)
    save = f"trap \"cp '{slurm.state}/next' '{run}/STATUS.json'; exit 1\" USR1"
    slurm.program("accelerate", save, f"touch '{slurm.state}/began'", "while :; do sleep 0.05; done")
    job = slurm.start("train", "config.yaml", f"run.dir={run}")
    wait_for((slurm.state / "began").exists, job, slurm)
    job.terminate()
    assert job.wait(PATIENCE_S) == 3, slurm.output
    assert status(run)["state"] == "preempted"
    assert slurm.requeued == [] and "SIGTERM asked for an end" in slurm.output


def test_a_job_that_is_told_to_stop_before_it_has_begun_is_queued_again_but_not_for_ever(
    slurm: Slurm, run: Path
) -> None:
    """Ranks that get the signal during their imports leave no STATUS.json. The same command can start the run later."""
    leave = "trap 'exit 1' USR1"
    slurm.program("accelerate", leave, f"touch '{slurm.state}/began'", "while :; do sleep 0.05; done")
    codes = []
    for _ in range(4):
        job = slurm.start("train", "config.yaml", f"run.dir={run}")
        wait_for((slurm.state / "began").exists, job, slurm)
        (slurm.state / "began").unlink()
        job.send_signal(signal.SIGUSR1)
        codes.append(job.wait(PATIENCE_S))
    assert codes == [0, 0, 0, 1], slurm.output
    assert len(slurm.requeued) == 3 and "given up" in slurm.output


@pytest.mark.parametrize("job", ["train", "elastic"])
def test_no_head_node_is_an_error_before_anything_starts(slurm: Slurm, run: Path, job: str) -> None:
    """With a fallback to localhost each node would form a separate world, and all would write to one run."""
    (slurm.state / "no-hosts").touch()
    for name in ("accelerate", "torchrun"):
        slurm.program(name)
    assert slurm.run(job, "config.yaml", f"run.dir={run}") == 1
    assert "scontrol show hostnames 'node[1-1]' named no node" in slurm.output
    assert not (slurm.state / "accelerate").exists() and not (slurm.state / "torchrun").exists()


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["config.yaml"], {}, "give run.dir=DIR"),
        (["config.yaml", "run.dir=runs/x"], {"DISTVSD_RANKS": ""}, "no GPUs were given to this job"),
    ],
)
def test_what_a_job_cannot_do_without_is_asked_for(
    slurm: Slurm, arguments: list[str], environment: dict[str, str], message: str
) -> None:
    slurm.program("accelerate")
    assert slurm.run("train", *arguments, **environment) == 1
    assert message in slurm.output and not (slurm.state / "accelerate").exists()


def test_an_array_trains_each_task_with_its_own_line_and_requeues_it_alone(slurm: Slurm, tmp_path: Path) -> None:
    trials = tmp_path / "trials.txt"
    trials.write_text('prior.guidance_scale=3\nprior.guidance_scale=7.5 "prompt=a $(red) cube"\n')
    runs = tmp_path / "runs of a sweep"
    task = {"SLURM_ARRAY_JOB_ID": slurm.id, "SLURM_ARRAY_TASK_ID": "2"}
    line = ("sweep", "config.yaml", str(trials), str(runs), "log.wandb_group=sizes")
    (runs / "2").mkdir(parents=True)
    write_status(slurm.state / "next", "preempted", 4, 10)
    slurm.program("torchrun", f"cp '{slurm.state}/next' '{runs}/2/STATUS.json'", "exit 1")
    slurm.program("distvsd")
    assert slurm.run(*line, **task) == 0, slurm.output
    # The plain job id of an array task may refer to the whole array.
    assert slurm.requeued == [f"{slurm.id}_2"]
    started = ["distvsd.train", "config.yaml", "log.wandb_group=sizes", "prior.guidance_scale=7.5"]
    started += ["prompt=a $(red) cube", f"run.dir={runs}/2"]
    assert slurm.arguments("torchrun")[-6:] == started
    assert not (slurm.state / "distvsd").exists()  # nothing is evaluated before the end

    slurm.program("torchrun")
    assert slurm.run(*line, **task) == 0
    assert slurm.arguments("distvsd") == ["evaluate", f"{runs}/2"] and len(slurm.requeued) == 1
    assert slurm.run(*line, **(task | {"SLURM_ARRAY_TASK_ID": "3"})) == 1
    assert "has no line 3" in slurm.output


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)
def test_slurm_reads_what_the_jobs_ask_for(job: Path) -> None:
    """sbatch reads #SBATCH lines up to the first command. The signal must leave time for the save."""
    lines = job.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    asked = [line.split(maxsplit=1)[1] for line in lines[:first] if line.startswith("#SBATCH")]
    assert not any(line.startswith("#SBATCH") for line in lines[first:])
    assert {"--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= set(asked)
    (notice,) = (re.fullmatch(r"--signal=B:USR1@(\d+)", line) for line in asked if line.startswith("--signal"))
    (patience,) = re.findall(r"PET_SHUTDOWN_TIMEOUT=(\d+)", (job.parent / "job.sh").read_text())
    assert notice is not None and 0 < int(patience) <= int(notice[1]) - 20


def training(run: Path, prior: Path, rounds: int) -> list[str]:
    """The arguments of a small run."""
    changes = {"parallel.numerics": "fast", "schedule.rounds": rounds, "checkpoint.every": 1, "log.every": 1}
    return ["configs/smoke.yaml", *overrides(run, prior, **changes)]


def status(run: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run / "STATUS.json").read_text())
    return record


def rounds(run: Path) -> list[int]:
    lines = (run / "metrics.jsonl").read_text().split("\n")[:-1] if (run / "metrics.jsonl").exists() else []
    return [json.loads(line)["round"] for line in lines]


def wait_for(condition: Callable[[], bool], job: subprocess.Popen[str], slurm: Slurm) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert job.poll() is None and time.monotonic() < deadline, f"the condition was not met in time:\n{slurm.output}"
        time.sleep(0.05)


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[Slurm]:
    """A job of two nodes with one rank each. Its processes are killed after the test."""
    slurm = Slurm(tmp_path, 2, ACCELERATE_USE_CPU="true", DISTVSD_FAULTS="sleep@round:ms=400")
    yield slurm
    for pid in slurm.tasks():
        kill_all_of(pid)


def kill_all_of(pid: int) -> None:
    """Kills a process and its descendants, as a power failure does."""
    if psutil.pid_exists(pid):
        process = psutil.Process(pid)
        for each in [process, *process.children(recursive=True)]:
            each.kill()


@cpu_only
@pytest.mark.guarantee("G25")
def test_a_job_whose_time_is_over_saves_is_queued_again_and_finishes(
    two_nodes: Slurm, run: Path, prior: Path, figure: Figure
) -> None:
    """After SIGUSR1 to train.sbatch on two nodes, as Slurm sends it before the time limit, the ranks save and scontrol
    requeue is called exactly once. The restarted job continues and finishes."""
    line = ("train", *training(run, prior, 8))
    job = two_nodes.start(*line)
    wait_for(lambda: len(rounds(run)) >= 2, job, two_nodes)
    began = time.monotonic()
    job.send_signal(signal.SIGUSR1)
    assert job.wait(PATIENCE_S) == 0, two_nodes.output
    figure(f"{time.monotonic() - began:.1f} s from SIGUSR1 to the requeue, of a run of 2 nodes")
    stopped = status(run)
    assert stopped["state"] == "preempted" and 2 <= stopped["round"] < 8, two_nodes.output
    assert two_nodes.requeued == [two_nodes.id]
    assert not any(map(psutil.pid_exists, two_nodes.tasks()))
    verify_run(run)

    assert two_nodes.run(*line, DISTVSD_FAULTS="", SLURM_RESTART_COUNT="1") == 0, two_nodes.output
    assert status(run)["state"] == "done" and rounds(run) == list(range(1, 9))
    assert len(two_nodes.requeued) == 1 and "restart 1" in two_nodes.output
    manifest = json.loads((run / "checkpoints/step-00000008/manifest.json").read_text())
    assert manifest["world_size"] == 2


@cpu_only
@pytest.mark.guarantee("G21")
def test_a_job_goes_on_with_the_nodes_that_are_left(two_nodes: Slurm, run: Path, prior: Path, figure: Figure) -> None:
    """All processes on one of the two nodes of elastic.sbatch are killed at once. In the same job, the other node
    continues alone from the newest checkpoint and finishes."""
    job = two_nodes.start("elastic", *training(run, prior, 10), PET_RDZV_CONF="last_call_timeout=3")
    wait_for(lambda: len(rounds(run)) >= 3, job, two_nodes)
    port = 10000 + int(two_nodes.id) % 20000
    tasks = two_nodes.tasks()
    # The node with the rendezvous must survive.
    (head,) = (pid for pid in tasks if port in {at.laddr.port for at in listening(pid)})
    (dies,) = set(tasks) - {head}
    began, reached = time.monotonic(), rounds(run)[-1]
    kill_all_of(dies)
    wait_for(lambda: (rounds(run) or [0])[-1] > reached + 1, job, two_nodes)
    figure(f"{time.monotonic() - began:.0f} s from the death of a node to the next round on the other")
    assert job.wait(PATIENCE_S) == 0, two_nodes.output
    assert status(run)["state"] == "done" and rounds(run) == list(range(1, 11))
    assert two_nodes.requeued == []
    manifest = json.loads((run / "checkpoints/step-00000010/manifest.json").read_text())
    assert manifest["world_size"] == 1


def listening(pid: int) -> list[Any]:
    return [at for at in psutil.Process(pid).net_connections("tcp") if at.status == psutil.CONN_LISTEN]
