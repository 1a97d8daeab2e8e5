"""Finds the launcher process of this rank, watches whether it lives, and ends the rank after the launcher's death.

A launcher that is killed cannot end its ranks, and no other process does. Standard library only: this runs before all
other imports, because a launcher may die while its ranks import. Which rank of which world this is says
`parallel.launch`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_POLL_S: Final = 0.2
_PR_SET_PDEATHSIG: Final = 1

# Environment variables that launchers set for the processes that they start and do not have themselves; the most
# specific first.
_ELASTIC: Final = "TORCHELASTIC_RUN_ID"  # torchrun, and accelerate launch for several processes
_GENERIC: Final = "RANK"  # any launcher that sets RANK and WORLD_SIZE
_MARKS: Final = (_ELASTIC, "OMPI_COMM_WORLD_RANK", "ACCELERATE_MIXED_PRECISION", _GENERIC)


@dataclass(frozen=True)
class Launcher:
    """ancestors: pids from this process's parent up to the launcher; processes in between are wrappers such as a shell.

    was_dead: the launcher died before this process looked for it.
    """

    ancestors: tuple[int, ...]
    was_dead: bool = False

    def has_died(self) -> bool:
        """Whether the launcher or a wrapper is gone. The kernel gives the children of a dead process another parent, so
        the parents show it even if pids are reused."""
        if self.was_dead or os.getppid() != self.ancestors[0]:
            return True
        links = itertools.pairwise(self.ancestors)
        return any((found := _parent(child)) is not None and found != parent for child, parent in links)


def find_launcher(environment: Mapping[str, str] = os.environ) -> Launcher | None:
    """The launcher that started this process; None if a person or a platform started it: then it outlives its shell.

    The launcher is the nearest ancestor without a variable that this process has (see `_MARKS`). If all ancestors have
    it (a cluster may set RANK for everything in a pod) there is no launcher. RANK counts only together with WORLD_SIZE
    and not under nohup. A task of srun is recognised by its parent, the step daemon, because every shell of a job has
    its variables.
    """
    mark = next((name for name in _MARKS if name in environment), None)
    if mark == _GENERIC and ("WORLD_SIZE" not in environment or _under_nohup()):
        mark = None
    if mark is None:
        parent = os.getppid()
        return Launcher((parent,)) if "SLURM_PROCID" in environment and _name(parent) == "slurmstepd" else None
    ancestors: list[int] = []
    child, above = os.getpid(), os.getppid()
    while above:  # 0: outside of this PID namespace
        ancestors.append(above)
        if _variable(above, mark) != environment[mark]:
            return Launcher(tuple(ancestors), _is_adopted(child, above, mark))
        child, above = above, _parent(above) or 0
    return None


class Watch:
    """Ends this process when its launcher has died: at once with code 1, or as `spare` says. A thread checks every
    `_POLL_S`.

    With kernel_too the kernel ends the process as well, which helps while the thread is blocked (a long library call
    during an import). This works on Linux for a process that the main thread of its parent has started: the kernel
    sends the signal at the end of the *thread* that started the process, and a launcher may continue after the end of
    another one.
    """

    def __init__(self, launcher: Launcher, kernel_too: bool = False) -> None:
        self._launcher, self._kernel_too = launcher, kernel_too
        self._done = threading.Event()
        self._spared: tuple[Callable[[], None], Callable[[float], bool]] | None = None

    def begin(self) -> None:
        if self._kernel_too:
            _at_parents_end(signal.SIGKILL if _is_child_of_main_thread(self._launcher.ancestors[0]) else signal.SIGCONT)
        if self._launcher.has_died():
            _end("its launcher died before it began")
        threading.Thread(target=self._run, name="launcher-watch", daemon=True).start()

    def spare(self, request: Callable[[], None], is_stuck: Callable[[float], bool]) -> None:
        """From now on the launcher's death calls `request` once, on the watch's thread. The process is ended only if
        is_stuck(time of the death by `time.monotonic`) is true."""
        self._spared = request, is_stuck
        if self._kernel_too:
            # SIGCONT wakes a stopped rank (SIGSTOP), which otherwise would stay for ever; others ignore it.
            _at_parents_end(signal.SIGCONT)

    def end(self) -> None:
        self._done.set()
        if self._kernel_too:
            _at_parents_end(0)

    def _run(self) -> None:
        while not self._launcher.has_died():
            if self._done.wait(_POLL_S):
                return
        died, told = time.monotonic(), False
        while not self._done.is_set():
            if self._spared is None:
                _end("its launcher died")
            else:
                request, is_stuck = self._spared
                if not told:
                    request()
                    told = True
                elif is_stuck(died):
                    _end(f"its launcher died {time.monotonic() - died:.0f} s ago, and it makes no progress")
            self._done.wait(_POLL_S)


_of_program: Watch | None = None


def watch_from_the_start() -> None:
    """For a process that only trains: finds and watches its launcher, if there is one."""
    global _of_program
    launcher = find_launcher()
    if launcher is not None:
        _of_program = Watch(launcher, kernel_too=True)
        _of_program.begin()


@contextmanager
def watched() -> Iterator[Watch | None]:
    """The watch of this process, None without a launcher: that of `watch_from_the_start`, or one for this block if
    another program calls the training."""
    launcher = None if _of_program else find_launcher()
    watch = _of_program
    if launcher is not None:
        watch = Watch(launcher)
        watch.begin()
    try:
        yield watch
    finally:
        if watch is not None and launcher is not None:
            watch.end()


def say(text: str) -> None:
    """Writes a line to standard error from any thread, shortly before the end; skips it if it would block."""
    rank = f" on rank {os.environ['RANK']}" if os.environ.get("RANK", "0") != "0" else ""
    with contextlib.suppress(OSError, ValueError):
        if select.select([], [2], [], 0)[1]:
            os.write(2, f"distvsd{rank}: {text}\n".encode())


def _end(why: str) -> None:
    say(f"{why}; ending")
    os._exit(1)


def _at_parents_end(number: int) -> None:
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):  # a C library without it
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(number), 0, 0, 0)


def _is_child_of_main_thread(parent: int) -> bool:
    """False if the system does not say."""
    try:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii")
    except OSError:
        return False
    return str(os.getpid()) in children.split()


def _is_adopted(child: int, parent: int, mark: str) -> bool:
    """Whether `parent` adopted `child` after the death of the process that started it, as far as can be known.

    A child starts in the session of its parent and leaves it only to lead its own. torchrun's workers lead their own;
    so for them the program is checked: torchrun and accelerate launch are Python, the processes that adopt orphans are
    not.
    """
    try:
        if os.getsid(child) != child:
            return os.getsid(parent) != os.getsid(child)
        program = Path(f"/proc/{parent}/cmdline").read_bytes().partition(b"\0")[0]
    except OSError:
        return False
    return mark == _ELASTIC and bool(program) and not Path(os.fsdecode(program)).name.startswith(("python", "pypy"))


def _under_nohup() -> bool:
    """Whether the end of the terminal ends the parent but not this process, as with nohup."""
    return signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and not _ignores(os.getppid(), signal.SIGHUP)


def _ignores(pid: int, number: int) -> bool:
    mask = _field(pid, "SigIgn")
    return mask is not None and bool(int(mask, 16) >> (number - 1) & 1)


def _parent(pid: int) -> int | None:
    """None if the system does not say."""
    found = _field(pid, "PPid")
    return None if found is None else int(found)


def _name(pid: int) -> str | None:
    return _field(pid, "Name")


def _field(pid: int, name: str) -> str | None:
    """A field of /proc/PID/status."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key == name:
                return value.strip()
    return None


def _variable(pid: int, name: str) -> str | None:
    """A variable of a process's initial environment; None if it is not set or cannot be seen."""
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            key, _, value = entry.partition(b"=")
            if key == name.encode():
                return os.fsdecode(value)
    return None
