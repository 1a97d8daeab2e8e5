"""What is logged reaches wandb; if wandb misbehaves, the caller still goes on at once.

Most tests use a stand-in for the wandb package (tests/fakes), because only that can be made to hang. The real one is
used offline, and its own file is read back.
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distvsd.runtime.tracker import Limits, Mode, Tracker, open_tracker
from tests.wandb_file import history_of, records_of

ROOT = Path(__file__).parents[3]
# Long enough to start Python on a busy machine; tests of a wandb that hangs shorten these.
PATIENT = Limits(ready_s=60, answer_s=60)

Calls = Callable[[], list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def no_settings_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Replaces wandb by the stand-in; gives a function that returns the calls so far."""
    path = tmp_path / "calls.jsonl"
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests/fakes"))
    monkeypatch.setenv("FAKE_WANDB_CALLS", str(path))
    return lambda: [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Opened:
    """A tracker of a run directory and the notes it made."""

    def __init__(self, run: Path, mode: Mode = "offline", limits: Limits = PATIENT, group: str = "") -> None:
        run.mkdir(exist_ok=True)
        self.notes: list[str] = []
        self.threads: set[int] = set()
        config = {"prompt": "a red cube", "particles": {"count": 2}}
        self.tracker: Tracker = open_tracker(mode, run, "castles", "small", group, config, self._note, limits)

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.threads.add(threading.get_ident())


def named(calls: Calls, name: str) -> list[dict[str, Any]]:
    return [call for call in calls() if call["call"] == name]


def wait_until(holds: Callable[[], object], why: str, limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, why
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_off_is_silent_and_starts_nothing(tmp_path: Path, calls: Calls) -> None:
    opened = Opened(tmp_path / "run", "off")
    opened.tracker.log({"score_loss": 1.0}, 1)
    opened.tracker.close()
    assert opened.tracker.run_id is None and opened.tracker.dropped == 0
    assert opened.notes == [] and calls() == [] and list((tmp_path / "run").iterdir()) == []


def test_everything_reaches_wandb_in_order_with_its_round(tmp_path: Path, calls: Calls) -> None:
    opened = Opened(tmp_path / "run")
    renders = tmp_path / "run/renders"
    opened.tracker.log({"score_loss": 0.5, "lag": None, "phase_s": {"render": 0.25}}, 10)
    opened.tracker.images([renders / "round-00000010/particles-000000-000001/contact-sheet.png"], 10)
    opened.tracker.images([renders / "contact-sheet.png", renders / "turntable.mp4"], 20)
    opened.tracker.particles([{"id": 0, "quarantined": False}, {"id": 1, "labels": ["red", "cube"]}], 20)
    opened.tracker.summary({"evaluation/empty": 0})
    opened.tracker.close()
    (start,) = named(calls, "init")
    assert (start["project"], start["name"], start["mode"], start["resume"]) == ("castles", "small", "offline", "allow")
    assert start["config"] == {"prompt": "a red cube", "particles": {"count": 2}} and "group" not in start
    table = [[0, False, None], [1, None, '["red", "cube"]']]
    assert [(call["step"], call["data"]) for call in named(calls, "log")] == [
        (10, {"score_loss": 0.5, "phase_s": {"render": 0.25}}),
        (10, {"particles-000000-000001/contact-sheet": "Image(contact-sheet.png)"}),
        (20, {"contact-sheet": "Image(contact-sheet.png)", "turntable": "Video(turntable.mp4)"}),
        (20, {"particles": f"Table(['id', 'quarantined', 'labels'], {table})"}),
    ]
    assert named(calls, "summary")[0]["numbers"] == {"evaluation/empty": 0}
    assert named(calls, "finish")[0]["exit_code"] == 0
    assert opened.tracker.dropped == 0 and opened.notes == []


def test_the_real_wandb_keeps_the_run_offline_and_goes_on_with_its_id(tmp_path: Path) -> None:
    """Two starts of one run: the numbers of both are in wandb's own files, under one id."""
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    for first in (1, 3):
        opened = Opened(run)
        for round in (first, first + 1):
            opened.tracker.log({"round": round, "score_loss": 1 / round, "phase_s": {"render": 0.5}}, round)
        opened.tracker.particles([{"id": 0, "quarantined": False, "label/color": "red"}], first + 1)
        opened.tracker.close(60)
        assert opened.notes == [] and opened.tracker.dropped == 0
    files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and {path.stem for path in files} == {f"run-{opened.tracker.run_id}"}
    seen: list[dict[str, Any]] = []
    for record in (record for path in files for record in records_of(path)):
        if record.WhichOneof("record_type") == "run":
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            assert config["particles"] == {"count": 2} and record.run.project == "castles"
        seen += history_of(record)
    assert [(row["_step"], row["round"], row["score_loss"]) for row in seen] == [(n, n, 1 / n) for n in (1, 2, 3, 4)]
    assert all(row["particles/nrows"] == 1 for row in seen[1::2])


@pytest.mark.parametrize("point", ["import", "init", "log", "finish"])
@pytest.mark.parametrize("kind", ["hang", "raise", "die"])
def test_a_wandb_that_misbehaves_is_told_once_and_costs_the_caller_nothing(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch, kind: str, point: str
) -> None:
    monkeypatch.setenv("FAKE_WANDB", f"{kind}@{point}")
    opened = Opened(tmp_path / "run", limits=Limits(ready_s=3 if point in ("import", "init") else 60, answer_s=1))
    slowest = 0.0
    for round in range(50):
        before = time.thread_time()
        opened.tracker.log({"round": round}, round)
        slowest = max(slowest, time.thread_time() - before)
    began = time.monotonic()
    opened.tracker.close(timeout_s=90)
    assert time.monotonic() - began < 60 and slowest < 0.05
    assert opened.tracker.dropped == (0 if point == "finish" else 50)
    telling = [text for text in opened.notes if "metrics.jsonl has every line" not in text]
    assert len(telling) == 1 and "wandb" in telling[0], opened.notes
    assert len(opened.notes) - len(telling) == (0 if point == "finish" else 1)
    assert opened.threads == {threading.get_ident()}
    assert all(is_gone(call["pid"]) for call in calls())


def test_closing_waits_only_as_long_as_it_is_told(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_WANDB", "hang@init")
    opened = Opened(tmp_path / "run")
    wait_until(lambda: named(calls, "init"), "the process never came to init")
    opened.tracker.log({"round": 1}, 1)
    began = time.monotonic()
    opened.tracker.close(timeout_s=0.2)
    assert time.monotonic() - began < 5
    assert opened.tracker.dropped == 1 and "did not finish within 0.2 s" in opened.notes[0]
    assert is_gone(calls()[0]["pid"])
    opened.tracker.close()
    opened.tracker.log({"round": 2}, 2)
    assert opened.tracker.dropped == 2


def test_a_slow_wandb_loses_notes_and_counts_them(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_WANDB", "slow@log")
    opened = Opened(tmp_path / "run", limits=Limits(queue=5, ready_s=60))
    for round in range(100):
        opened.tracker.log({"round": round}, round)
    opened.tracker.close(60)
    arrived = [call["step"] for call in named(calls, "log")]
    assert arrived == sorted(arrived) and 5 <= len(arrived) <= 10
    assert opened.tracker.dropped == 100 - len(arrived)
    assert named(calls, "finish")[0]["exit_code"] == 0
    assert f"{opened.tracker.dropped} notes were dropped" in opened.notes[-1] and "distvsd log" in opened.notes[-1]


def test_what_is_not_json_is_one_lost_note(tmp_path: Path, calls: Calls) -> None:
    opened = Opened(tmp_path / "run")
    endless: dict[str, Any] = {}
    endless["itself"] = endless
    opened.tracker.log(endless, 1)
    opened.tracker.log({"folder": Path("renders")}, 2)
    opened.tracker.close()
    assert opened.tracker.dropped == 1
    assert [call["data"] for call in named(calls, "log")] == [{"folder": "renders"}]


def test_without_wandb_the_note_says_what_to_install(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb.py").write_text("raise ModuleNotFoundError(\"No module named 'wandb'\")\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    opened = Opened(tmp_path / "run", "online")
    opened.tracker.log({"round": 1}, 1)
    opened.tracker.close()
    assert opened.notes[0] == "log.wandb is set, but wandb is not installed: pip install 'distvsd[wandb]'"
    assert opened.tracker.dropped == 1


def test_a_folder_called_wandb_where_the_run_was_started_is_not_the_package(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wandb itself leaves such a folder; Python would import it as an empty package."""
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/__init__.py").write_text("raise RuntimeError('the wrong one')")
    monkeypatch.chdir(tmp_path)
    opened = Opened(tmp_path / "run")
    opened.tracker.close()
    assert opened.notes == [] and len(named(calls, "init")) == 1


@pytest.fixture
def server() -> Iterator[Callable[[int], str]]:
    """Starts a server that answers every request with a status, or never if it is 0, and returns its address."""
    servers: list[http.server.ThreadingHTTPServer] = []
    closing = threading.Event()

    def start(status: int) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if status == 0:
                    closing.wait(60)
                    return
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Silent."""

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    closing.set()
    for one in servers:
        one.shutdown()
        one.server_close()


@pytest.mark.parametrize("status", [200, 404])
def test_a_server_that_answers_is_used(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch, server: Callable[[int], str], status: int
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", server(status))
    opened = Opened(tmp_path / "run", "online")
    opened.tracker.close()
    assert [call["mode"] for call in named(calls, "init")] == ["online"] and opened.notes == []


@pytest.mark.parametrize("trouble", ["HTTP 503", "timed out", "refused", "unknown url type"])
def test_a_server_that_does_not_answer_is_noticed_before_wandb_is_opened(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch, server: Callable[[int], str], trouble: str
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
        addresses = {"HTTP 503": 503, "timed out": 0}
        url = server(addresses[trouble]) if trouble in addresses else nobody
        monkeypatch.setenv("WANDB_BASE_URL", "nowhere" if trouble == "unknown url type" else url)
        opened = Opened(tmp_path / "run", "online", Limits(probe_s=1, ready_s=60))
        opened.tracker.log({"round": 1}, 1)
        opened.tracker.close(60)
    assert [call["mode"] for call in named(calls, "init")] == ["offline"]
    assert [call["step"] for call in named(calls, "log")] == [1]
    assert len(opened.notes) == 1 and trouble in opened.notes[0] and "`wandb sync` sends it later" in opened.notes[0]


def test_a_server_that_refuses_the_run_leaves_it_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Callable[[int], str]
) -> None:
    """The real wandb without a key: it raises in init, and a second process opens it offline."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_BASE_URL", server(404))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    opened = Opened(tmp_path / "run", "online")
    opened.tracker.log({"round": 1}, 1)
    opened.tracker.close(90)
    assert opened.tracker.dropped == 0, opened.notes
    assert len(opened.notes) == 1 and "wandb is used offline" in opened.notes[0] and "key" in opened.notes[0].lower()
    assert len(list((tmp_path / "run/wandb").glob("offline-run-*"))) == 1


def test_a_resumed_run_keeps_its_id_and_a_sweep_decides_it(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def opened_id(group: str = "") -> str | None:
        opened = Opened(run, group=group)
        opened.tracker.close()
        assert opened.notes == [] and named(calls, "init")[-1]["id"] == opened.tracker.run_id
        return opened.tracker.run_id

    first = opened_id()
    assert first and opened_id() == first
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep9")
    monkeypatch.setenv("WANDB_RUN_ID", "trial7")
    assert opened_id() == "trial7" and named(calls, "init")[-1]["group"] == "sweep9"
    monkeypatch.delenv("WANDB_RUN_ID")
    monkeypatch.setenv("WANDB_PROJECT", "of the agent")
    assert opened_id("mine") == "trial7", "the id outlives the agent that chose it"
    last = named(calls, "init")[-1]
    assert last["group"] == "mine" and "project" not in last
    (run / "wandb.json").write_text("[]")
    assert opened_id() not in (None, first, "trial7")


@pytest.mark.parametrize(("variable", "modes"), [("offline", ["offline"]), ("disabled", [])])
def test_the_environment_can_take_wandb_down(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch, variable: str, modes: list[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", variable)
    opened = Opened(tmp_path / "run", "online")
    opened.tracker.close()
    assert [call["mode"] for call in named(calls, "init")] == modes and opened.notes == []


@pytest.mark.parametrize("outcome", ["failed", "preempted"])
def test_wandb_is_told_how_the_run_ended(tmp_path: Path, calls: Calls, outcome: Any) -> None:
    opened = Opened(tmp_path / "run")
    opened.tracker.close(outcome=outcome)
    ending = ["mark_preempting", "finish"] if outcome == "preempted" else ["finish"]
    assert [call["call"] for call in calls()] == ["import", "init", *ending]
    assert named(calls, "finish")[0]["exit_code"] == 1


DYING = """
import os, signal, sys, threading
from pathlib import Path
from distvsd.runtime.tracker import open_tracker
tracker = open_tracker("offline", Path(sys.argv[1]), "", "", "", {}, print)
tracker.log({"round": 1}, 1)
print("logged", flush=True)
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_rank_leaves_a_failed_run_and_no_process(tmp_path: Path, calls: Calls) -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ['PYTHONPATH']}"}
    (tmp_path / "run").mkdir()
    rank = subprocess.Popen(
        [sys.executable, "-c", DYING, str(tmp_path / "run")],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with rank:
        wait_until(lambda: named(calls, "log"), "the note never arrived")
        # A scheduler sends SIGTERM to every process of a job; wandb's process must not end before the rank.
        os.kill(calls()[0]["pid"], signal.SIGTERM)
        rank.communicate("die\n")
    assert rank.returncode == -signal.SIGKILL
    wait_until(lambda: named(calls, "finish"), "the run was never finished")
    assert named(calls, "finish")[0]["exit_code"] == 1
    wait_until(lambda: is_gone(calls()[0]["pid"]), "the process of wandb was left behind")
