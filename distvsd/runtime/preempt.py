"""Signals as requests: a scheduler or a person asks a run to end, and it saves and ends after the round.

A handler only records the request. All ranks agree after each round whether any of them was asked, so the signal may
reach any one rank. Before there is anything to save, a signal ends the process at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, Final, Self

from distvsd.errors import PREEMPTED
from distvsd.runtime.launcher import say

SIGNALS: Final = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

# A terminal and Slurm signal the launcher and its workers, and the launcher then forwards the signal: one request
# arrives twice within a moment. Only a later signal is a second request.
ECHO_S: Final = 2.0


class NothingBegun:
    """While entered, SIGTERM, SIGUSR1 and SIGINT end the process at once with a message and exit code 3: there is
    nothing to save yet, and the same command starts the run again.

    A thread gets the signals through `signal.set_wakeup_fd`, because the main thread may be deep in an import, or wait
    for other ranks inside torch, where no Python handler runs. Does nothing when entered outside the main thread.
    """

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}
        self._writer = self._wakeup = -1

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            threading.Thread(target=_obey, args=(reader,), name="signals", daemon=True).start()
            self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, _ignore) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        _restore(self._before)
        self.ignore_signals()

    def ignore_signals(self) -> None:
        """From now on the signals do nothing."""
        if self._writer >= 0:
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._writer)  # which ends the thread
            self._writer = -1


_start: NothingBegun | None = None


def obey_from_the_start() -> None:
    """For a process that only trains: signals end it at once (`NothingBegun`) until a Preemption is entered. After that
    one is left, signals do nothing: the process is about to exit with its own code."""
    global _start
    _start = NothingBegun().__enter__()


def leave_by_signal() -> None:
    """At the end of such a process: if it never began to train, signals have their default effect from now on."""
    if _start is not None:
        _start.ignore_signals()
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


class Preemption:
    """While entered, SIGTERM, SIGUSR1 and SIGINT are recorded in `requested` instead of ending the process.

    A second signal of the same kind, more than `ECHO_S` after the first, ends the process at once: KeyboardInterrupt
    for SIGINT, exit code 128 + number without cleanup for the others. Python runs handlers on the main thread between
    two bytecodes, so a signal during a long library call is recorded when that call returns. Entered outside the main
    thread it touches no signals; only `request` works. Leaving restores the handlers.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: seconds."""
        self.requested: str | None = None
        self._clock = clock
        self._first: dict[int, float] = {}
        self._before: dict[signal.Signals, Any] = {}
        self._wakeup = -1

    def __enter__(self) -> Preemption:
        global _start
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
            if _start is not None:
                _start.ignore_signals()
                _start = None
            self._wakeup = signal.set_wakeup_fd(-1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before:
            signal.set_wakeup_fd(self._wakeup)
        _restore(self._before)
        self._before = {}

    @contextlib.contextmanager
    def nothing_begun(self) -> Iterator[None]:
        """Inside this block a signal ends the process at once (see `NothingBegun`), also one that was recorded
        before."""
        with NothingBegun():
            if self.requested is not None:
                _leave(self.requested)
            yield

    def request(self, why: str) -> None:
        """Asks the run to end; the first reason is kept. May be called from any thread."""
        if self.requested is None:
            self.requested = why

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = self._clock()
        if now - self._first.setdefault(number, now) > ECHO_S:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            os._exit(128 + number)
        self.request(signal.Signals(number).name)


def _obey(reader: int) -> None:
    """Ends the process at the first of `SIGNALS` in the pipe, which has one byte a signal."""
    while number := os.read(reader, 1):
        if number[0] in SIGNALS:
            _leave(signal.Signals(number[0]).name)
    os.close(reader)


def _leave(why: str) -> None:
    say(f"told to stop by {why} before training had begun; the same command line starts it")
    os._exit(PREEMPTED)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Does nothing. Without a handler the interpreter would not write the signal to the wakeup descriptor."""


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        # None: a handler that Python did not install, and cannot restore.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
