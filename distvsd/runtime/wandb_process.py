"""The process that holds wandb, started by `runtime/tracker.py` as a script; it imports nothing of this package.

wandb in the process of a rank would share its interpreter lock, its signal handlers and its exit; here it may hang,
crash or be killed, and the rank does not notice. Requests come as JSON lines on standard input, one answer each on
standard output: `{"ok": ...}` or `{"error": text}`. When the input ends without `finish`, the rank died: the run is
finished as failed, in bounded time.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from typing import Any, TextIO

ORPHAN_S = 20.0  # to finish after the rank died
INIT_S = 60  # wandb's own patience with a server that answered the first question


class Unreachable(Exception):
    """The server was asked before wandb was, and does not work."""


def main() -> int:
    """Serves requests until `finish` or the end of the input; the exit status tells nothing."""
    answers = _take_stdout()
    # A scheduler signals every process of a job; the rank decides what becomes of the run, and says so.
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(kind, signal.SIG_IGN)
    os.nice(10)
    threading.Thread(target=_watch_parent, args=(int(sys.argv[1]),), daemon=True).start()
    session = Session()
    while line := sys.stdin.readline():
        request = json.loads(line)
        try:
            answer: dict[str, Any] = {"ok": session.serve(request)}
        except (Exception, SystemExit) as error:  # wandb raises anything; whatever it is must be told
            answer = {"error": f"{type(error).__name__}: {error}".replace("\n", " ")[:500]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if request["do"] == "finish":
            break
    else:
        session.finish("failed")
    return 0


class Session:
    """One run in wandb."""

    def __init__(self) -> None:
        self._wandb: Any = None
        self._run: Any = None

    def serve(self, request: dict[str, Any]) -> Any:
        """Does what is asked; returns what the rank is told, and raises whatever wandb raises."""
        match request["do"]:
            case "start":
                return self.start(request)
            case "log":
                self._run.log({k: v for k, v in request["record"].items() if v is not None}, step=request["round"])
            case "images":
                media = {key: self._media(path) for key, path in request["files"].items()}
                self._run.log(media, step=request["round"])
            case "particles":
                columns = list(dict.fromkeys(key for row in request["rows"] for key in row))
                data = [[_cell(row.get(key)) for key in columns] for row in request["rows"]]
                table = self._wandb.Table(columns=columns, data=data)
                self._run.log({"particles": table}, step=request["round"])
            case "summary":
                self._run.summary.update(request["record"])
            case "finish":
                self.finish(request["outcome"])
        return None

    def start(self, request: dict[str, Any]) -> str | None:
        """Opens the run; returns its page, None where it has none. Raises ImportError, Unreachable, or wandb's own."""
        import wandb

        if request["mode"] == "online":
            base = os.environ.get("WANDB_BASE_URL") or str(wandb.setup().settings.base_url)
            # Before init: one that fails takes its whole timeout, and offline after it fails as well (wandb#9865).
            refuse_unreachable(base, request["probe_s"])
        self._wandb = wandb
        self._run = wandb.init(
            mode=request["mode"],
            dir=request["folder"],
            id=request["id"],
            resume="allow",
            config=request["config"],
            settings={"console": "off", "silent": True, "init_timeout": INIT_S, "x_stats_pid": request["pid"]},
            **{key: request[key] for key in ("project", "name", "group") if request[key]},
        )
        url = getattr(self._run, "url", None)
        return str(url) if url else None

    def finish(self, outcome: str) -> None:
        """Ends the run; preempted tells a sweep that it may be queued again."""
        if self._run is None:
            return
        if outcome == "preempted":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if outcome == "done" else 1)

    def _media(self, path: str) -> Any:
        return self._wandb.Video(path, format="mp4") if path.endswith(".mp4") else self._wandb.Image(path)


def refuse_unreachable(base: str, timeout_s: float) -> None:
    """Raises Unreachable unless a server answers at this address with anything but an error of its own."""
    request = urllib.request.Request(base, headers={"User-Agent": "distvsd"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s):
            return
    except urllib.error.HTTPError as error:
        if error.code < 500:
            return
        reason: object = f"HTTP {error.code}"
    except urllib.error.URLError as error:
        reason = error.reason
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = error
    raise Unreachable(f"{base} does not answer ({reason})")


def _cell(value: Any) -> Any:
    """A table's column has one type, and labels come as whatever the evaluation calls them."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def _take_stdout() -> TextIO:
    """The answers' stream; what wandb prints goes with the errors, where it cannot be taken for an answer."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _watch_parent(parent: int) -> None:
    """Kills this process with wandb's own, which share its group, some time after the rank died: nobody else will."""
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(ORPHAN_S)
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    # Not sys.exit: wandb's exit hooks wait for its service, and all that had to be sent was sent by finish.
    code = main()
    sys.stderr.flush()
    os._exit(code)
