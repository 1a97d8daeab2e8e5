"""Weights and Biases, without ever blocking a run. Rank 0 opens a tracker; `metrics.jsonl` is the complete record.

Calls put a note into a bounded queue. A daemon thread sends the notes, one at a time, to a process that runs wandb
(`runtime/wandb_process.py`, through `runtime/wandb_child.py`), and kills it if it does not answer in time.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from distvsd.errors import RunError
from distvsd.runtime import inside
from distvsd.runtime.wandb_child import Child, Gone

Mode = Literal["off", "offline", "online"]
Outcome = Literal["done", "failed", "preempted"]
RUN_ID = "wandb.json"


@dataclass(frozen=True)
class Limits:
    """Limits on a slow wandb. The training loop waits for none of them.

    queue: notes. probe_s: for the server to answer before wandb is opened. ready_s: for wandb to import and open a run.
    answer_s: for any other answer.
    """

    queue: int = 1000
    probe_s: float = 5.0
    ready_s: float = 120.0
    answer_s: float = 60.0


@dataclass(frozen=True)
class Opening:
    """The arguments of wandb. Empty project, name or group: wandb's default or environment variable."""

    mode: Mode
    run_dir: Path
    run_id: str
    project: str
    name: str
    group: str
    config: dict[str, Any]


def open_tracker(
    mode: Mode,
    run_dir: Path,
    project: str,
    name: str,
    group: str,
    config: dict[str, Any],
    note: Callable[[str], None],
    limits: Limits | None = None,
) -> Tracker:
    """The tracker of a run; call it on one rank only. Never raises, and returns before wandb is imported.

    mode: `online` becomes offline if the server does not answer or refuses. The run's id is kept in RUN/wandb.json, so
    a resumed run continues the same wandb run. The variables of a sweep agent (WANDB_RUN_ID, WANDB_PROJECT,
    WANDB_RUN_GROUP, WANDB_NAME, WANDB_MODE) override the arguments. note: called with each problem once, during calls
    of the tracker, in the caller's thread.
    """
    mode = _lowered(mode)
    if mode == "off":
        return Tracker(None, note, limits or Limits())
    environment = os.environ
    opening = Opening(
        mode=mode,
        run_dir=run_dir,
        run_id=_run_id(run_dir, note),
        project="" if environment.get("WANDB_PROJECT") else project,
        name="" if environment.get("WANDB_NAME") else name,
        group="" if environment.get("WANDB_RUN_GROUP") else group or environment.get("WANDB_SWEEP_ID", ""),
        config=config,
    )
    return Tracker(opening, note, limits or Limits())


class Tracker:
    """Takes the reports of a run. No call raises or blocks for more than microseconds, except `close`, which waits.

    dropped: notes that did not reach wandb because it was slow, broken or unreachable. run_id: None if the mode is off.
    """

    def __init__(self, opening: Opening | None, note: Callable[[str], None], limits: Limits) -> None:
        self.run_id = opening.run_id if opening else None
        self._opening, self._note, self._limits = opening, note, limits
        self._refused = self._lost = 0  # one counter a thread: += is not atomic
        self._said: deque[str] = deque()
        self._child: Child | None = None
        self._abandoned = False
        self._is_open = opening is not None
        # One more than notes may use: the request to finish always fits.
        self._queue: queue.Queue[dict[str, Any]] = queue.Queue(limits.queue + 1)
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        if self._is_open:
            self._thread.start()

    @property
    def dropped(self) -> int:
        return self._refused + self._lost

    def log(self, record: Mapping[str, Any], round: int) -> None:
        """A line of metrics without its None entries; wandb groups mappings. Do not change the record afterwards."""
        self._put({"do": "log", "record": dict(record), "round": round})

    def images(self, files: Sequence[Path], round: int) -> None:
        """Pictures (png) and turntables (mp4), named by their path below RUN/renders without the round's folder."""
        self._put(
            {"do": "images", "files": {self._title(path): str(path.absolute()) for path in files}, "round": round}
        )

    def particles(self, rows: list[dict[str, Any]], round: int) -> None:
        """A table with a row a particle: its id, its health, its labels."""
        self._put({"do": "particles", "rows": list(rows), "round": round})

    def summary(self, record: Mapping[str, Any]) -> None:
        """Single numbers of the whole run, such as its evaluation; a sweep can optimise them."""
        self._put({"do": "summary", "record": dict(record)})

    def close(self, timeout_s: float = 20.0, outcome: Outcome = "done") -> None:
        """Waits at most this long until all notes were sent, then kills wandb. May be called again."""
        if not self._is_open:
            return
        self._is_open = False
        deadline = time.monotonic() + timeout_s
        self._queue.put({"do": "finish", "outcome": outcome})
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._abandoned = True
            self._say(f"wandb did not finish within {timeout_s:g} s and was ended")
            if self._child is not None:
                self._child.kill()
            self._thread.join(1.0)
        self._refused += self._left()  # notes that came while the thread was ending
        if self.dropped and self._opening is not None:
            self._say(
                f"wandb: {self.dropped} notes were dropped; metrics.jsonl has every line, "
                f"`distvsd log {self._opening.run_dir}` sends them again"
            )
        self._tell()

    def _put(self, request: dict[str, Any]) -> None:
        """Queues a note, or counts it as dropped. Runs in the caller's thread."""
        if self.run_id is None:
            return
        self._tell()
        if not self._is_open or not self._thread.is_alive() or self._queue.qsize() >= self._limits.queue:
            self._refused += 1
        else:
            self._queue.put_nowait(request)

    def _title(self, path: Path) -> str:
        parts = path.with_suffix("").parts
        if "renders" in parts:
            parts = parts[len(parts) - parts[::-1].index("renders") :]
        return "/".join(part for part in parts if not part.startswith("round-")) or path.stem

    def _say(self, text: str) -> None:
        self._said.append(text)

    def _tell(self) -> None:
        """What the thread had to say, in the thread of the caller: a progress line belongs to one thread."""
        while self._said:
            self._note(self._said.popleft())

    def _work(self) -> None:
        """The thread: opens wandb, sends the notes, and counts those that were left when wandb ended."""
        in_hand = 0
        try:
            if not self._open():
                return
            while True:
                request = self._queue.get()
                in_hand = int(request["do"] != "finish")
                self._hand_over(request)
                if request["do"] == "finish":
                    return
                in_hand = 0
        except Gone as error:
            if not self._abandoned:
                self._say(f"wandb {error}; the run goes on without it")
        finally:
            self._lost += in_hand + self._left()
            if self._child is not None:
                self._child.end()

    def _left(self) -> int:
        """Empties the queue; returns the number of notes in it."""
        count = 0
        while not self._queue.empty():
            count += self._queue.get_nowait()["do"] != "finish"
        return count

    def _open(self) -> bool:
        """Starts wandb, offline if online fails; False if neither works. Raises Gone."""
        assert self._opening is not None, "a tracker that is off has no thread"
        modes: list[Mode] = ["online", "offline"] if self._opening.mode == "online" else ["offline"]
        for mode in modes:
            problem = self._start(replace(self._opening, mode=mode))
            if problem is None:
                return True
            if "No module named 'wandb'" in problem:
                self._say("log.wandb is set, but wandb is not installed: pip install 'distvsd[wandb]'")
                return False
            if mode == "online":
                self._say(
                    f"wandb is used offline: {problem}. The run is kept in {self._opening.run_dir / 'wandb'}; "
                    "`wandb sync` sends it later"
                )
            else:
                self._say(f"wandb cannot be opened, the run goes on without it: {problem}")
        return False

    def _start(self, opening: Opening) -> str | None:
        """Opens wandb in a new process for each attempt: after a failed init it may not start again in the same one.
        Returns the problem, None after success."""
        try:
            # wandb opens existing files of its folder; everything else is in new folders.
            inside.make_folder(opening.run_dir, "wandb")
            inside.expect_file(opening.run_dir, "wandb/console.log")
        except RunError as error:
            return str(error)
        self._child = Child(opening.run_dir / "wandb")
        if self._abandoned:
            raise Gone("was ended")
        request = {
            "do": "start",
            "mode": opening.mode,
            "folder": str(opening.run_dir.absolute()),
            "id": opening.run_id,
            "project": opening.project,
            "name": opening.name,
            "group": opening.group,
            "config": opening.config,
            "probe_s": self._limits.probe_s,
            "pid": os.getpid(),
        }
        try:
            answer = self._child.ask(request, self._limits.ready_s)
        except Gone as error:
            if self._abandoned:
                raise
            answer = {"error": f"it {error} while it was opened"}
        if "error" in answer:
            self._child.end()
            return str(answer["error"])
        if answer["ok"]:
            self._say(f"wandb: {answer['ok']}")
        return None

    def _hand_over(self, request: dict[str, Any]) -> None:
        assert self._child is not None, "a request comes after the start"
        answer = self._child.ask(request, self._limits.answer_s)
        if "error" in answer:
            if not self._lost:
                self._say(f"wandb did not take a note of kind {request['do']}: {answer['error']}")
            self._lost += request["do"] != "finish"


def _lowered(mode: Mode) -> Mode:
    """The mode after WANDB_MODE, which can only reduce it."""
    match os.environ.get("WANDB_MODE", ""):
        case "disabled":
            return "off"
        case "offline" | "dryrun":
            return "offline" if mode == "online" else mode
    return mode


def _run_id(run_dir: Path, note: Callable[[str], None]) -> str:
    """The id of the sweep's trial, else the run directory's, else a new one; written to the run directory."""
    kept = None
    with contextlib.suppress(RunError, ValueError, RecursionError):
        content = json.loads(inside.read(run_dir, RUN_ID) or b"{}")
        kept = content.get("run_id") if isinstance(content, dict) else None
    run_id = os.environ.get("WANDB_RUN_ID") or (kept if isinstance(kept, str) and kept else uuid.uuid4().hex[:12])
    if run_id != kept:
        try:
            inside.write(run_dir, RUN_ID, json.dumps({"run_id": run_id}) + "\n")
        except RunError as error:
            note(f"wandb: a resumed run will begin as a new one there: {error}")
    return run_id
