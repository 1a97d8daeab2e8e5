"""Finding a rank's launcher in real process trees, and the end of a rank whose launcher died.

Whole launchers are killed in tests/launchers/test_orphans.py.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distvsd.runtime.heartbeat import Heartbeat
from distvsd.runtime.launcher import Watch, find_launcher
from distvsd.runtime.process import process_state

ROOT = Path(__file__).parents[3]
RANK_OF_ONE = {"RANK": "0", "WORLD_SIZE": "1"}
FORK = multiprocessing.get_context("fork")
MARKS = ("RANK", "WORLD_SIZE", "TORCHELASTIC_", "ACCELERATE_", "OMPI_", "SLURM_")
# Prints the launcher that it finds. If AFTER is the pid of its parent, it first waits for the death of the parent.
FIND = """
import json, os, sys, time
from distvsd.runtime.launcher import find_launcher
while os.getppid() == int(os.environ.get("AFTER", "0")):
    time.sleep(0.01)
found = find_launcher()
print(json.dumps(None if found is None else [*found.ancestors, found.was_dead]), flush=True)
"""


def without_marks() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(MARKS)} | {"PYTHONPATH": str(ROOT)}


def shell(folder: Path, script: str, **variables: str) -> tuple[Any, int]:
    """Runs a shell script that calls `$FIND`: what that found, and the shell's pid. `true` at the end keeps the shell
    from replacing itself by the last command."""
    (folder / "find.py").write_text(FIND)
    shell = subprocess.Popen(
        ["/bin/sh", "-c", f"{script}; true"],
        env=without_marks() | {"FIND": f"{sys.executable} {folder / 'find.py'}"} | variables,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Ignored signals are inherited: under `nohup make test` every shell would look like one under nohup.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    said, _ = shell.communicate(timeout=60)  # waits also for a process that outlives the shell
    return json.loads(said), shell.pid


@pytest.mark.parametrize(
    "marks",
    ["RANK=0 WORLD_SIZE=1", "RANK=1 WORLD_SIZE=2", "TORCHELASTIC_RUN_ID=a RANK=0", "ACCELERATE_MIXED_PRECISION=no"],
)
def test_who_sets_the_marks_of_a_rank_is_its_launcher(tmp_path: Path, marks: str) -> None:
    found, pid = shell(tmp_path, f"{marks} $FIND")
    assert found == [pid, False]


@pytest.mark.parametrize("marks", ["A=1", "RANK=0", "WORLD_SIZE=2", "ACCELERATE_USE_CPU=true", "SLURM_PROCID=0"])
def test_what_a_person_may_have_set_makes_no_launcher(tmp_path: Path, marks: str) -> None:
    assert shell(tmp_path, f"{marks} $FIND")[0] is None


def test_shells_between_a_launcher_and_its_rank_belong_to_it(tmp_path: Path) -> None:
    found, pid = shell(tmp_path, "RANK=0 WORLD_SIZE=2 sh -c 'sh -c \"$FIND; true\"; true'")
    *wrappers, launcher, was_dead = found
    assert (len(wrappers), launcher, was_dead) == (2, pid, False)


def test_a_rank_from_the_environment_that_a_shell_itself_was_started_in_comes_from_above(tmp_path: Path) -> None:
    """As in the pod of a cluster, where RANK is set for every process: the shell is not the launcher."""
    found, pid = shell(tmp_path, "$FIND", RANK="0", WORLD_SIZE="2")
    assert found == [pid, os.getpid(), False]


@pytest.mark.parametrize(
    ("script", "is_watched"),
    [("RANK=0 WORLD_SIZE=2 nohup $FIND", False), ("trap '' HUP; RANK=0 WORLD_SIZE=2 $FIND", True)],
    ids=["before a rank", "before its launcher"],
)
def test_nohup_makes_a_rank_stay_only_where_it_was_meant_for_the_rank(
    tmp_path: Path, script: str, is_watched: bool
) -> None:
    assert (shell(tmp_path, script)[0] is not None) == is_watched


@pytest.mark.skipif(sys.platform != "linux", reason="which process adopts orphans, and its session, are Linux's")
@pytest.mark.parametrize(
    "start", ["RANK=0 WORLD_SIZE=1 $FIND", "TORCHELASTIC_RUN_ID=a setsid $FIND"], ids=["in its session", "leading one"]
)
def test_a_launcher_that_died_before_its_rank_looked_for_it_is_known_to_be_dead(tmp_path: Path, start: str) -> None:
    """By then the parent is the process that adopts orphans, which is alive."""
    found, pid = shell(tmp_path, f"export AFTER=$$; {start} & kill -9 $$")
    assert found[0] != pid and found[-1] is True


def orphaned(folder: Path, marks: dict[str, str], busy_s: float = 0.0, takes_s: float = 0.0, spare: bool = True) -> int:
    """Kills the parent of a process that watches it; returns the pipe into which the process writes when asked to end.

    For `busy_s` the process reports progress, then a phase that may take `takes_s`.
    """
    reader, writer = os.pipe()

    def launcher() -> None:
        if os.fork() == 0:
            os.environ.update(marks)
            found = find_launcher()
            with Heartbeat(folder, 0, 2, interval_s=0.05, grace_s=0.3) as beating:
                if found is not None:
                    watch = Watch(found)
                    watch.begin()
                    if spare:
                        watch.spare(lambda: os.write(writer, b"orphan;"), beating.is_stuck)  # type: ignore[arg-type]
                os.write(writer, b"ready;")
                for step in range(round(busy_s / 0.05)):
                    beating.at(step, "render")
                    time.sleep(0.05)
                beating.at(0, "save", takes_s)
                time.sleep(20)
            os._exit(0)
        time.sleep(60)

    process = FORK.Process(target=launcher)
    process.start()
    os.close(writer)
    assert os.read(reader, 6) == b"ready;"
    process.kill()
    process.join()
    return reader


@pytest.mark.parametrize("spare", [True, False], ids=["in training", "before it"])
def test_a_rank_that_lost_its_launcher_is_asked_once_if_it_trains_and_ends(tmp_path: Path, spare: bool) -> None:
    reader = orphaned(tmp_path, RANK_OF_ONE, spare=spare)
    began = time.monotonic()
    said = b""
    while block := os.read(reader, 100):  # end of file: the last process that holds the pipe has ended
        said += block
    assert said == (b"orphan;" if spare else b"")
    assert time.monotonic() - began < 15
    os.close(reader)


@pytest.mark.parametrize(("busy_s", "takes_s"), [(1.5, 0.0), (0.0, 1.5)])
def test_it_has_its_grace_after_the_last_progress_and_as_long_as_its_save_may_take(
    tmp_path: Path, busy_s: float, takes_s: float
) -> None:
    reader = orphaned(tmp_path, RANK_OF_ONE, busy_s, takes_s)
    began = time.monotonic()
    while os.read(reader, 100):
        pass
    assert 1.2 < time.monotonic() - began < 16
    os.close(reader)


def test_without_a_launcher_the_end_of_the_parent_is_nothing(tmp_path: Path) -> None:
    """As with nohup: the shell ends, and the run goes on."""
    reader = orphaned(tmp_path, {})
    assert not select.select([reader], [], [], 1.0)[0]
    os.kill(json.loads((tmp_path / "rank-00000.json").read_text())["pid"], signal.SIGKILL)
    os.close(reader)


@pytest.mark.skipif(sys.platform != "linux", reason="only there the end of a thread ends the children it started")
def test_the_end_of_a_thread_of_the_launcher_is_not_its_end(tmp_path: Path) -> None:
    """A rank that a helper thread of the launcher has started outlives the thread, but not the launcher."""
    (tmp_path / "rank.py").write_text(
        "import sys, time\nfrom distvsd.runtime.launcher import watch_from_the_start\n"
        "watch_from_the_start()\nprint('watching', flush=True)\ntime.sleep(60)\n"
    )
    launch = (
        "import os, subprocess, sys, threading, time\n"
        "def start():\n"
        "    global rank\n"
        f"    environment = os.environ | {RANK_OF_ONE}\n"
        f"    command = [sys.executable, {str(tmp_path / 'rank.py')!r}]\n"
        "    rank = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)\n"
        "    rank.stdout.readline()\n"
        "helper = threading.Thread(target=start)\nhelper.start()\nhelper.join()\ntime.sleep(0.6)\n"
        "print(rank.pid if rank.poll() is None else 0, flush=True)\ntime.sleep(60)\n"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", launch], stdout=subprocess.PIPE, text=True, env=without_marks(), cwd=ROOT
    )
    assert launcher.stdout is not None
    rank = int(launcher.stdout.readline())
    assert rank, "it ended with the thread"
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 20
    while process_state(rank)[0] not in "?ZX":
        assert time.monotonic() < deadline, "it outlives its launcher"
        time.sleep(0.02)
