"""A run directory has one owner, and nothing a user writes in a prompt becomes a path."""

from __future__ import annotations

import itertools
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from distvsd.errors import RunError
from distvsd.runtime import inside
from distvsd.runtime.paths import RunLock, RunPaths


def test_the_names_in_a_run_directory_are_the_documented_ones(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    named = [paths.status, paths.config, paths.metrics, paths.health, paths.lock, paths.checkpoints, paths.renders]
    named += [paths.evaluation]
    assert [str(path.relative_to(tmp_path)) for path in named] == [
        "STATUS.json",
        "config.yaml",
        "metrics.jsonl",
        "health.jsonl",
        "run.lock",
        "checkpoints",
        "renders",
        "evaluation.json",
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_made_with_its_parents_and_left_clean(tmp_path: Path) -> None:
    RunPaths(tmp_path / "a" / "b").create()
    RunPaths(tmp_path / "a" / "b").create()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_what_cannot_be_a_run_directory_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RunError, match=r"run\.dir .* is a file"):
            RunPaths(root).create()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for root in (tmp_path / ("x" * 300), Path("/proc/distvsd"), tmp_path / "a\0b", tmp_path / "loop"):
        with pytest.raises(RunError, match=r"run\.dir"):
            RunPaths(root).create()
    assert (tmp_path / "file").read_text() == "mine"


def test_claiming_a_directory(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    with pytest.raises(RunError, match="--resume must"):
        paths.claim("seed: 1\n", "must")
    paths.claim("seed: 1\n", "auto")
    assert paths.previous_config() == "seed: 1\n"
    paths.claim("seed: 1\n", "auto")
    with pytest.raises(RunError, match=r"seed: 1.*seed: 2.*--resume must"):
        paths.claim("seed: 2\n", "auto")
    with pytest.raises(RunError, match="--resume auto"):
        paths.claim("seed: 1\n", "never")
    assert paths.previous_config() == "seed: 1\n"
    paths.claim("seed: 2\n", "must")
    assert paths.previous_config() == "seed: 1\n", "not before the run was resumed with it"
    paths.adopt("seed: 2\n")
    assert paths.previous_config() == "seed: 2\n"
    paths.claim("seed: 2 # spelled otherwise\n", "auto", differences=[])
    with pytest.raises(RunError, match=r"run\.seed was 2"):
        paths.claim("seed: 3\n", "auto", differences=["run.seed was 2"])


def test_a_fresh_run_may_insist_on_being_fresh(tmp_path: Path) -> None:
    RunPaths(tmp_path).claim("seed: 1\n", "never")
    assert RunPaths(tmp_path).previous_config() == "seed: 1\n"


def test_the_lock_names_its_holder_and_goes_with_it(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with RunLock(path):
        assert path.read_text().startswith(f"{socket.gethostname()}:{os.getpid()}")
    assert not path.exists()


@pytest.mark.guarantee("G34")
@pytest.mark.parametrize("form", ["host:pid", "host:pid:start"])
def test_a_living_holder_is_refused_by_name(tmp_path: Path, form: str) -> None:
    """A directory held by a living process is refused, and the message names the holder."""
    path = tmp_path / "run.lock"
    code = (
        "import sys; from pathlib import Path; from distvsd.runtime.paths import RunLock; "
        f"RunLock(Path({str(path)!r})).acquire(); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        if form == "host:pid":
            path.write_text(f"{socket.gethostname()}:{holder.pid}")
        with pytest.raises(RunError, match=f":{holder.pid}\\b"):
            RunLock(path).acquire()
        RunLock(path).release()
        assert path.exists(), "only the holder gives a lock back"
        holder.kill()  # not reaped: a zombie holds no lock
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
        with RunLock(path):
            assert path.read_text().split(":")[1] == str(os.getpid())
    finally:
        holder.kill()
        holder.communicate()


def _dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    child.wait()
    return child.pid


@pytest.mark.guarantee("G34")
@pytest.mark.parametrize("end", ["", ":123456", "\n", "\0\0\0"])
def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path, end: str) -> None:
    """The lock of a process that is gone is taken over."""
    path = tmp_path / "run.lock"
    path.write_text(f"{socket.gethostname()}:{_dead_pid()}{end}")
    with RunLock(path):
        assert path.read_text().split(":")[1] == str(os.getpid())


def test_a_lock_whose_pid_belongs_to_a_younger_process_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    path.write_text(f"{socket.gethostname()}:{os.getppid()}:1")
    with RunLock(path):
        assert path.read_text().split(":")[1] == str(os.getpid())


@pytest.mark.parametrize("text", ["", "\0" * 20])
def test_an_empty_lock_file_holds_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.lock"
    path.write_text(text)
    with RunLock(path):
        assert path.read_text()


@pytest.mark.parametrize("text", ["other-host:1", "other-host:1:5", "somebody's notes", "host:99999999999999999999"])
def test_a_holder_that_cannot_be_judged_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.lock"
    path.write_text(text)
    with pytest.raises(RunError, match="delete the file"):
        RunLock(path).acquire()
    assert path.read_text() == text


@pytest.mark.guarantee("G34")
def test_of_many_jobs_that_find_one_dead_holder_one_gets_the_lock(tmp_path: Path) -> None:
    """Of many jobs that find the same dead holder, one gets the directory."""
    path = tmp_path / "run.lock"
    path.write_text(f"{socket.gethostname()}:{_dead_pid()}")
    taken, refused = _race(path, 8)
    assert len(taken) == 1 and refused == 7
    assert path.read_text().split(":")[1] == str(taken[0])


def test_of_many_jobs_on_a_fresh_directory_one_gets_the_lock(tmp_path: Path) -> None:
    taken, refused = _race(tmp_path / "run.lock", 8)
    assert len(taken) == 1 and refused == 7


def _race(path: Path, jobs: int) -> tuple[list[int], int]:
    """Forks jobs that acquire at one moment and live until all have tried: (pids with the lock, number refused)."""
    start_read, start_write = os.pipe()
    told_read, told_write = os.pipe()
    end_read, end_write = os.pipe()
    pids = []
    for _ in range(jobs):
        pid = os.fork()
        if pid == 0:
            os.close(start_write), os.close(end_write)
            os.read(start_read, 1)
            try:
                RunLock(path).acquire()
                os.write(told_write, f"{os.getpid():09d}\n".encode())
            except RunError:
                os.write(told_write, b"refused..\n")
            os.read(end_read, 1)
            os._exit(0)
        pids.append(pid)
    os.close(start_write)
    told = b""
    while len(told) < 10 * jobs:
        told += os.read(told_read, 10 * jobs)
    os.close(end_write)
    for pid in pids:
        os.waitpid(pid, 0)
    for handle in (start_read, told_read, told_write, end_read):
        os.close(handle)
    words = told.decode().split()
    return [int(word) for word in words if word[0] != "r"], words.count("refused..")


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "STATUS.json"
    inside.write(path.parent, path.name, "a" * 100_000)
    seen: set[str] = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            text = path.read_text()
            seen.add(f"{len(text)}{''.join(sorted(set(text)))}")

    reader = threading.Thread(target=read)
    reader.start()
    for letter in "bcdefgh" * 5:
        inside.write(path.parent, path.name, letter * 100_000)
    done.set()
    reader.join()
    assert seen <= {f"100000{letter}" for letter in "abcdefgh"} and seen
    assert [entry.name for entry in tmp_path.iterdir()] == ["STATUS.json"]


def test_a_failed_write_leaves_the_old_text_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "STATUS.json"
    inside.write(path.parent, path.name, "old")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(RunError, match="No space left"):
        inside.write(path.parent, path.name, "new")
    assert path.read_text() == "old" and [entry.name for entry in tmp_path.iterdir()] == ["STATUS.json"]


@pytest.mark.guarantee("G34")
@pytest.mark.parametrize("holder", ["elsewhere:7:1", f"{socket.gethostname()}:{2**22 + 1}:1:another-boot.1"])
def test_a_holder_on_another_host_or_in_another_container_keeps_the_lock_while_its_ranks_beat(
    tmp_path: Path, holder: str
) -> None:
    """A holder on another host, or in another container of the same host name, cannot be found by its pid. It keeps its
    lock while its ranks beat, and loses it when they are silent."""
    lock, beats = tmp_path / "run.lock", tmp_path / "heartbeats"
    beats.mkdir()
    lock.write_text(holder)
    stop = threading.Event()

    def beat() -> None:
        for count in itertools.count():
            (beats / "rank-00000.json").write_text(str(count))
            if stop.wait(0.02):
                return

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(RunError, match=re.escape(holder)):
            RunLock(lock, beats, silence_s=0.3).acquire()
    finally:
        stop.set()
        thread.join()
    with RunLock(lock, beats, silence_s=0.3):
        assert lock.read_text().startswith(f"{socket.gethostname()}:{os.getpid()}"), "its ranks are silent: taken over"


def test_a_holder_on_another_host_without_heartbeats_is_left_in_place(tmp_path: Path) -> None:
    lock = tmp_path / "run.lock"
    lock.write_text("elsewhere:7:1")
    for beats in (None, tmp_path / "none"):
        with pytest.raises(RunError, match="elsewhere:7"):
            RunLock(lock, beats, silence_s=0.1).acquire()
