"""Process trees, found by a mark in the environment that every child process inherits."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.launchers.test_end_to_end import environment

ROOT = Path(__file__).parents[2]
MARK = "DISTVSD_TEST_FAMILY"
PATIENCE_S = 120.0  # for imports on a busy machine


class Family:
    """A command and all processes that it starts. `output` is what they have printed so far."""

    def __init__(self, command: list[str], log: Path, **variables: str) -> None:
        self.name = uuid.uuid4().hex
        self._log = log
        with log.open("w") as stream:
            self.parent = subprocess.Popen(
                command,
                env=environment(HF_HOME=str(log.with_suffix(".hf")), ACCELERATE_USE_CPU="true")
                | {MARK: self.name}
                | variables,
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
            )

    @property
    def output(self) -> str:
        return self._log.read_text()

    def ranks(self) -> list[int]:
        """The running ranks of this family. A forked process without RANK in its environment is not one yet."""
        return [pid for pid in self.living() if pid != self.parent.pid and _is_a_rank(pid)]

    def living(self) -> list[int]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                mine = f"{MARK}={self.name}".encode() in (folder / "environ").read_bytes().split(b"\0")
                if mine and state(int(folder.name)) not in "ZX":
                    found.append(int(folder.name))
        return found

    def until(self, condition: Callable[[], object], limit_s: float = PATIENCE_S) -> float:
        """Waits for the condition. Returns the seconds that this took."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < limit_s, f"the condition was not met in time:\n{self.output}"
            time.sleep(0.1)  # each check reads all of /proc
        return time.monotonic() - began


@contextmanager
def family(command: list[str], log: Path, **variables: str) -> Iterator[Family]:
    """Starts a family. Kills all its processes at the end, even if the test fails."""
    started = Family(command, log, **variables)
    try:
        yield started
    finally:
        started.parent.kill()
        started.parent.wait()
        for pid in started.living():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _is_a_rank(pid: int) -> bool:
    with suppress(OSError):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return any(variable.startswith(b"RANK=") for variable in variables)
    return False
