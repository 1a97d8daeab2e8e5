"""Requests to the process that runs wandb: one answer each, within a time limit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distvsd.errors import RunError
from distvsd.runtime import inside

PROCESS = Path(__file__).with_name("wandb_process.py")


class Gone(Exception):
    """The process died, or was killed because it did not answer."""


class Child:
    """The process that runs wandb, in its own session, so that processes that wandb starts are in its group."""

    def __init__(self, folder: Path) -> None:
        with _console(folder) as console:
            try:
                self._process = subprocess.Popen(
                    # -P: no folder `wandb` in the working directory and no module beside the script hides the package.
                    [sys.executable, "-P", str(PROCESS), str(os.getpid())],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=console,
                    start_new_session=True,
                )
            except OSError as error:
                raise Gone(f"cannot be started ({error})") from error
        self._is_late = False

    def ask(self, request: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """Sends a request and returns its answer. Raises Gone, at the latest after `limit_s`."""
        assert self._process.stdin is not None and self._process.stdout is not None, "both are pipes"
        try:
            line = json.dumps(request, default=str).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            return {"error": f"cannot be written as JSON ({error})"}
        watchdog = threading.Timer(limit_s, self._expire)
        watchdog.daemon = True
        watchdog.start()
        answer = b""
        with contextlib.suppress(OSError):  # a broken pipe: there is no answer either
            self._process.stdin.write(line)
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        watchdog.cancel()
        if answer.endswith(b"\n"):
            parsed: dict[str, Any] = json.loads(answer)
            return parsed
        raise Gone(f"did not answer for {limit_s:g} s and was ended" if self._is_late else "died")

    def kill(self) -> None:
        """Kills the process and all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Lets the process exit for a moment after its last answer, then kills it."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2.0)
        self.kill()
        self._process.wait()

    def _expire(self) -> None:
        self._is_late = True
        self.kill()


@contextlib.contextmanager
def _console(folder: Path) -> Iterator[int]:
    """A descriptor for wandb's own messages: RUN/wandb/console.log, or the null device if that cannot be written."""
    try:
        handle = inside.open_file(folder.parent, f"{folder.name}/console.log", os.O_APPEND)
    except RunError:
        yield subprocess.DEVNULL
        return
    try:
        yield handle
    finally:
        os.close(handle)
