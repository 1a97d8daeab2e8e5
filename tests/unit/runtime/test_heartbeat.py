"""Heartbeats: where each rank is, which ranks fell silent, and what a worker does when its launcher died."""

from __future__ import annotations

import json
import multiprocessing
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from distvsd.errors import RankError
from distvsd.runtime.heartbeat import Heartbeat, forget_ranks

FORK = multiprocessing.get_context("fork")


def heartbeat(folder: Path, rank: int = 0, size: int = 2, interval_s: float = 0.01) -> Heartbeat:
    return Heartbeat(folder, rank, size, 120.0, interval_s)


def read(folder: Path, rank: int) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / f"rank-{rank:05d}.json").read_text())
    return record


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


@contextmanager
def rank_1(folder: Path, then: Callable[[], None]) -> Iterator[int]:
    """Starts a process that beats as rank 1 in phase render of round 7 and then calls `then`; yields its pid."""
    reader, writer = os.pipe()

    def live() -> None:
        with heartbeat(folder, 1) as beating:
            beating.at(7, "render")
            until(lambda: read(folder, 1)["phase"] == "render")
            os.write(writer, b"ready")
            then()

    process = FORK.Process(target=live)
    process.start()
    try:
        assert select.select([reader], [], [], 20)[0], "rank 1 did not start"
        assert process.pid is not None
        yield process.pid
    finally:
        process.kill()
        process.join()
        os.close(reader)
        os.close(writer)


def put(folder: Path, rank: int, **changes: Any) -> None:
    """Writes another rank's heartbeat file."""
    record = {"rank": rank, "host": "elsewhere", "pid": 17, "start": "5", "round": 7, "phase": "score", "beats": 3}
    folder.mkdir(exist_ok=True)
    (folder / f"rank-{rank:05d}.json").write_text(json.dumps(record | {"ended": ""} | changes))


def test_the_file_says_who_is_where_and_its_count_grows(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "heartbeats"
    with heartbeat(folder, rank=3, size=4) as beating:
        beating.at(12, "score")
        until(lambda: read(folder, 3)["phase"] == "score")
        record = read(folder, 3)
        assert (record["rank"], record["round"], record["host"]) == (3, 12, socket.gethostname())
        assert (record["pid"], record["ended"]) == (os.getpid(), "")
        until(lambda: read(folder, 3)["beats"] > record["beats"] + 3)


def test_a_rank_that_finished_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "heartbeats"
    with heartbeat(folder):
        with heartbeat(folder, 1):
            assert len(list(folder.iterdir())) >= 2
        assert (folder / "rank-00000.json").is_file()
    assert not folder.exists()


def test_a_rank_that_failed_leaves_its_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="boom"), heartbeat(tmp_path):
        raise ValueError("boom")
    assert read(tmp_path, 0)["ended"] == "ValueError: boom"


def test_what_the_ranks_of_an_earlier_start_left_can_be_swept_away(tmp_path: Path) -> None:
    for rank in (1, 2, 3):
        put(tmp_path, rank)
    forget_ranks(tmp_path)
    forget_ranks(tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_nothing_does_not_disturb(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with heartbeat(tmp_path / "file" / "heartbeats") as beating:
        beating.at(1, "render")
        assert beating.silent(wait_s=0.05).startswith("rank 1 has no heartbeat file")


@pytest.mark.parametrize(
    "changes", [{"ended": 5}, {"host": None}, {"pid": "x"}, {"round": []}, {"more": 1}, {"beats": 0.5}]
)
def test_a_file_with_other_types_than_a_rank_writes_is_no_sign_of_life(tmp_path: Path, changes: dict[str, Any]) -> None:
    with heartbeat(tmp_path) as beating:
        put(tmp_path, 1, **changes)
        assert beating.silent(wait_s=0.01).startswith("rank 1 has no heartbeat file")


def test_a_link_or_a_pipe_in_its_place_is_neither_followed_nor_waited_for(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "rank-00009.json").write_text("mine")
    (tmp_path / "linked").symlink_to(outside)
    with heartbeat(tmp_path / "linked"):
        pass
    (tmp_path / "run").mkdir()
    (tmp_path / "run/rank-00000.json").symlink_to(outside / "rank-00009.json")
    os.mkfifo(tmp_path / "run/rank-00001.json")
    with heartbeat(tmp_path / "run") as beating:
        assert beating.silent(wait_s=0.01).startswith("rank 1 has no heartbeat file")
    assert [(path.name, path.read_text()) for path in outside.iterdir()] == [("rank-00009.json", "mine")]


def test_ranks_that_all_beat_in_one_place_are_no_news(tmp_path: Path) -> None:
    with heartbeat(tmp_path) as one, heartbeat(tmp_path, 1) as two:
        for beating in (one, two):
            beating.at(7, "score")
        assert one.silent(wait_s=0.2) == two.silent(wait_s=0.2) == ""


def test_hosts_between_which_nothing_passes_are_named(tmp_path: Path) -> None:
    """With the network cut, the shared disk shows that the other host's rank waits in the same phase or ended."""
    with heartbeat(tmp_path) as beating:
        beating.at(7, "score")
        put(tmp_path, 1, ended=f"{RankError.__name__}: rank 1 of 2 lost the others")
        hosts = ", ".join(sorted((socket.gethostname(), "elsewhere")))
        assert beating.silent(wait_s=0.01) == (
            f"no rank is lost, so the network between hosts {hosts} is cut, or slower than parallel.timeout_s"
        )


def test_a_rank_that_beats_elsewhere_is_named_with_its_place(tmp_path: Path) -> None:
    with heartbeat(tmp_path) as one, heartbeat(tmp_path, 1) as two:
        one.at(7, "exchange")
        two.at(7, "render")
        assert one.silent(wait_s=0.2) == (
            f"rank 1 (host {socket.gethostname()}, pid {os.getpid()}, last seen in phase 'render' of round 7) still "
            "beats while this rank waits in phase 'exchange' of round 7"
        )


def test_a_process_that_is_gone_is_named_at_once(tmp_path: Path) -> None:
    with heartbeat(tmp_path) as beating, rank_1(tmp_path, lambda: os._exit(9)) as pid:
        until(lambda: "is gone" in beating.silent(wait_s=0.01))
        began = time.monotonic()
        assert beating.silent(wait_s=60) == (
            f"rank 1 (host {socket.gethostname()}, pid {pid}, last seen in phase 'render' of round 7) is gone: that "
            "process does not exist any more"
        )
        assert time.monotonic() - began < 30


def test_beside_a_process_that_is_gone_one_that_beats_slowly_is_not_accused(tmp_path: Path) -> None:
    with heartbeat(tmp_path, size=3) as beating, rank_1(tmp_path, lambda: os._exit(9)):
        put(tmp_path, 2)
        until(lambda: "is gone" in beating.silent(wait_s=0.01))
        assert "rank 2" not in beating.silent(wait_s=60)


def test_a_process_that_was_stopped_is_named_as_stopped(tmp_path: Path) -> None:
    with heartbeat(tmp_path) as beating, rank_1(tmp_path, lambda: os.kill(os.getpid(), signal.SIGSTOP)):
        until(lambda: "is stopped: that process exists" in beating.silent(wait_s=0.01))
        assert "seen in phase 'render' of round 7" in beating.silent(wait_s=60)


def test_a_pid_that_belongs_to_another_process_by_now_is_gone(tmp_path: Path) -> None:
    put(tmp_path, 1, host=socket.gethostname(), pid=os.getpid(), start="1")
    with heartbeat(tmp_path) as beating:
        assert "is gone" in beating.silent(wait_s=0.01)


def test_of_another_host_only_the_counts_are_judged(tmp_path: Path) -> None:
    put(tmp_path, 1)
    put(tmp_path, 2, beats=1)
    with heartbeat(tmp_path, size=3) as beating:
        beating.at(7, "score")
        text = beating.silent(wait_s=0.01)
        assert text.split("; ") == [
            f"rank {rank} (host elsewhere, pid 17, last seen in phase 'score' of round 7) does not beat any more"
            for rank in (1, 2)
        ]


def test_an_error_of_its_own_is_told_and_a_consequence_is_not(tmp_path: Path) -> None:
    with heartbeat(tmp_path, size=3) as beating:
        beating.at(7, "score")
        put(tmp_path, 1, ended=f"{RankError.__name__}: rank 1 of 3 lost the others")
        put(tmp_path, 2, ended="ValueError: boom")
        assert beating.silent(wait_s=0.01).endswith("of round 7) ended by itself: ValueError: boom")
        assert "rank 1" not in beating.silent(wait_s=0.01)


def test_nonsense_in_place_of_a_heartbeat_is_no_sign_of_life(tmp_path: Path) -> None:
    with heartbeat(tmp_path, size=4) as beating:
        for rank, text in ((1, "{"), (2, "[1]"), (3, '{"rank": 3}')):
            (tmp_path / f"rank-{rank:05d}.json").write_text(text)
        assert beating.silent(wait_s=0.01).count("has no heartbeat file") == 3


def test_a_record_that_is_being_written_is_read_again(tmp_path: Path) -> None:
    put(tmp_path, 1)
    path = tmp_path / "rank-00001.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:20])
    with heartbeat(tmp_path) as beating:
        beating.at(7, "score")
        finish = threading.Timer(0.03, path.write_bytes, [whole])
        finish.start()
        assert "does not beat any more" in beating.silent(wait_s=0.1)
        finish.join()


def test_a_rank_beats_on_where_no_new_file_can_be_made(tmp_path: Path) -> None:
    """As on a full disk: the file is overwritten in place, also a shorter or longer one of an earlier run."""
    put(tmp_path, 0, ended="x" * 700)
    before = (tmp_path / "rank-00000.json").stat().st_ino
    with heartbeat(tmp_path):
        assert read(tmp_path, 0)["ended"] == ""
        count = read(tmp_path, 0)["beats"]
        size = (tmp_path / "rank-00000.json").stat().st_size
        until(lambda: read(tmp_path, 0)["beats"] > count + 3)
        found = (tmp_path / "rank-00000.json").stat()
        assert (found.st_ino, found.st_size) == (before, size)
        assert [path.name for path in tmp_path.iterdir()] == ["rank-00000.json"]


def test_of_another_container_with_the_same_host_name_only_the_counts_are_judged(tmp_path: Path) -> None:
    put(tmp_path, 1, host=socket.gethostname(), pid=2**22 + 1, system="another-boot.1")  # no such process here
    with heartbeat(tmp_path) as beating:
        beating.at(7, "score")
        assert beating.silent(wait_s=0.01).endswith("does not beat any more")
