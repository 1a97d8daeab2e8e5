"""The process that runs wandb, started by `runtime/tracker.py` as a script; it imports nothing of this package.

In the process of a rank wandb would share the interpreter lock, the signal handlers and the exit. Here it may hang,
crash or be killed without an effect on the rank. Requests come as JSON lines on standard input, each with one answer on
standard output: `{"ok": ...}` or `{"error": text}`. If the input ends without `finish`, the rank died; then the run is
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
INIT_S = 60  # wandb's own timeout for a server that answered the probe


class Unreachable(Exception):
    """The server did not answer the probe before wandb was opened."""


def main() -> int:
    """Serves requests until `finish` or the end of the input. The exit status is always 0."""
    answers = _take_stdout()
    # A scheduler signals every process of a job; only the rank decides how the run ends.
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(kind, signal.SIG_IGN)
    os.nice(10)
    threading.Thread(target=_watch_parent, args=(int(sys.argv[1]),), daemon=True).start()
    session = Session()
    while line := sys.stdin.readline():
        request = json.loads(line)
        try:
            answer: dict[str, Any] = {"ok": session.serve(request)}
        except (Exception, SystemExit) as error:  # wandb may raise anything; the rank must hear of it
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
        """Serves one request; returns the answer, and raises what wandb raises."""
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
        """Opens the run; returns its page, None if there is none. Raises ImportError, Unreachable, or wandb's
        errors."""
        import wandb

        if request["mode"] == "online":
            base = os.environ.get("WANDB_BASE_URL") or str(wandb.setup().settings.base_url)
            # Before init: a failing init takes its whole timeout, and a later offline init fails too (wandb#9865).
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
        """Ends the run; with `preempted` a sweep may queue it again."""
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
    """A value for a table, whose columns have one type: numbers and texts as they are, anything else as JSON."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def _take_stdout() -> TextIO:
    """The stream for answers. wandb's own prints go to standard error instead."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _watch_parent(parent: int) -> None:
    """Kills this process and those that wandb started, `ORPHAN_S` after the rank died; no other process would."""
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(ORPHAN_S)
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    # Not sys.exit: wandb's exit hooks wait for its service, and all that had to be sent was sent by finish.
    code = main()
    sys.stderr.flush()
    os._exit(code)
