"""The launcher of this process: which process it is, whether it lives, and the end of a rank that has lost it.

A launcher that is killed cannot end its ranks, and nobody else does. Standard library only: this runs before all other
imports, because a launcher may die while its ranks are still importing.
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

# What launchers give to the processes that they start and do not have themselves; the most telling first.
_ELASTIC: Final = "TORCHELASTIC_RUN_ID"  # torchrun, and accelerate launch for several processes
_GENERIC: Final = "RANK"  # whoever sets RANK and WORLD_SIZE
_MARKS: Final = (_ELASTIC, "OMPI_COMM_WORLD_RANK", "ACCELERATE_MIXED_PRECISION", _GENERIC)


@dataclass(frozen=True)
class Launcher:
    """ancestors: pids from this process's parent up to the launcher; those between them are wrappers such as a shell.

    was_dead: the launcher had died before this process looked for it.
    """

    ancestors: tuple[int, ...]
    was_dead: bool = False

    def has_died(self) -> bool:
        """Whether the launcher or a wrapper is gone. The kernel gives the children of a dead process to another one, so
        that a link of the chain tells it even where pids are used again."""
        if self.was_dead or os.getppid() != self.ancestors[0]:
            return True
        links = itertools.pairwise(self.ancestors)
        return any((found := _parent(child)) is not None and found != parent for child, parent in links)


def find_launcher(environment: Mapping[str, str] = os.environ) -> Launcher | None:
    """The launcher that started this process; None for one that a person or a platform started, which outlives its
    shell.

    Started by a launcher is what has a mark in its environment that an ancestor lacks: that ancestor is the launcher.
    Where all of them have it (the pod of a cluster sets RANK for everything in it) there is none. RANK counts with
    WORLD_SIZE only, and not under nohup. A task of srun is known by its parent, the step daemon; its variables are in
    every shell of a job too.
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
    """Ends this process when its launcher has died: at once with code 1, or as `spare` says. Its thread looks every
    `_POLL_S`.

    Where kernel_too is True the kernel ends it as well, which helps where this thread is held up (one long call into a
    library during an import). It can do so on Linux, for a process that the main thread of its parent has started: the
    kernel's signal comes at the end of the *thread* that started it, and a launcher may live on without that one.
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
        """From now on the launcher's death is a request to end: `request` is called, once, on the watch's thread. The
        process is ended when is_stuck(time of the death by `time.monotonic`) says that it gets nowhere."""
        self._spared = request, is_stuck
        if self._kernel_too:
            # It wakes a rank that was stopped (SIGSTOP), which otherwise would stay for ever, and changes no other.
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
                    _end(f"its launcher died {time.monotonic() - died:.0f} s ago, and it gets nowhere")
            self._done.wait(_POLL_S)


_of_program: Watch | None = None


def watch_from_the_start() -> None:
    """For a program that is one training and nothing else: finds and watches its launcher, if there is one."""
    global _of_program
    launcher = find_launcher()
    if launcher is not None:
        _of_program = Watch(launcher, kernel_too=True)
        _of_program.begin()


@contextmanager
def watched() -> Iterator[Watch | None]:
    """The watch of this process for the block, None without a launcher: the program's own, or, where training is called
    from somebody else's program, one for this block."""
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
    """A line on standard error, from any thread, shortly before the end; it is left out where it would have to wait."""
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
    """False where the system does not tell."""
    try:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii")
    except OSError:
        return False
    return str(os.getpid()) in children.split()


def _is_adopted(child: int, parent: int, mark: str) -> bool:
    """Whether `parent` has not started `child` but got it when another process died, as far as can be told.

    A child is born into the session of its parent, and leaves it only to lead one of its own. torchrun's workers lead
    one; torchrun and accelerate launch are programs in Python, and what adopts orphans is not.
    """
    try:
        if os.getsid(child) != child:
            return os.getsid(parent) != os.getsid(child)
        program = Path(f"/proc/{parent}/cmdline").read_bytes().partition(b"\0")[0]
    except OSError:
        return False
    return mark == _ELASTIC and bool(program) and not Path(os.fsdecode(program)).name.startswith(("python", "pypy"))


def _under_nohup() -> bool:
    """Whether the end of a terminal ends the parent but not this process: somebody meant this one to stay."""
    return signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and not _ignores(os.getppid(), signal.SIGHUP)


def _ignores(pid: int, number: int) -> bool:
    mask = _field(pid, "SigIgn")
    return mask is not None and bool(int(mask, 16) >> (number - 1) & 1)


def _parent(pid: int) -> int | None:
    """None where the system does not tell."""
    found = _field(pid, "PPid")
    return None if found is None else int(found)


def _name(pid: int) -> str | None:
    return _field(pid, "Name")


def _field(pid: int, name: str) -> str | None:
    """Of /proc/PID/status."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key == name:
                return value.strip()
    return None


def _variable(pid: int, name: str) -> str | None:
    """Of the environment in which a process was started; None where it is not set, or cannot be seen."""
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            key, _, value = entry.partition(b"=")
            if key == name.encode():
                return os.fsdecode(value)
    return None
