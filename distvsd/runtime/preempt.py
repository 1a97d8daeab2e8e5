"""Signals as requests: a scheduler or a person asks a run to end, and it ends after the round with its work saved.

A handler only notes the request. Whether any rank was asked is agreed by all of them after each round, so that it is
enough for the signal to reach a single rank. Before there is anything to save a signal ends the process at once.
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

# A terminal and Slurm signal the launcher and its workers, and the launcher then forwards what it got: two arrivals of
# one request, a moment apart. Only a later one is somebody who does not want to wait.
ECHO_S: Final = 2.0


class NothingBegun:
    """While entered, SIGTERM, SIGUSR1 and SIGINT end the process at once, with a line that says so and exit code 3:
    there is nothing to save, and the same command line starts again.

    A thread is told of them by the interpreter itself (`signal.set_wakeup_fd`), because the main thread may be deep in
    an import, or wait for other ranks inside torch, where it gets to no handler. Entered on another thread than the
    main one it touches nothing.
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
        _put_back(self._before)
        self.deafen()

    def deafen(self) -> None:
        """From now on the signals do nothing."""
        if self._writer >= 0:
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._writer)  # which ends the thread
            self._writer = -1


_start: NothingBegun | None = None


def obey_from_the_start() -> None:
    """For a program that is one training and nothing else: signals end it at once (`NothingBegun`) until a Preemption
    is entered, and do nothing once that is left: the process is leaving, with a code of its own."""
    global _start
    _start = NothingBegun().__enter__()


def leave_by_signal() -> None:
    """The end of such a program: where it never began, a signal has its usual effect from now on."""
    if _start is not None:
        _start.deafen()
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


class Preemption:
    """While entered, SIGTERM, SIGUSR1 and SIGINT are noted in `requested` instead of ending the process.

    A second signal of a kind, more than `ECHO_S` after the first, ends the process at once: KeyboardInterrupt for
    SIGINT, exit code 128 + number without any tidying up for the others. Python runs handlers on the main thread
    only, between two of its own steps: during one long call into a library a signal is noted when that returns. Entered
    on another thread it touches no signals, and `request` is the only way in. Leaving puts back what was there before.
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
                _start.deafen()
                _start = None
            self._wakeup = signal.set_wakeup_fd(-1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before:
            signal.set_wakeup_fd(self._wakeup)
        _put_back(self._before)
        self._before = {}

    @contextlib.contextmanager
    def nothing_begun(self) -> Iterator[None]:
        """For the block inside this one a signal ends the process at once, as `NothingBegun` says; so does one that was
        noted before."""
        with NothingBegun():
            if self.requested is not None:
                _leave(self.requested)
            yield

    def request(self, why: str) -> None:
        """Asks this run to end; the first reason is kept. May be called from any thread."""
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
    """Ends the process by the first of `SIGNALS` that comes through the pipe, one byte each."""
    while number := os.read(reader, 1):
        if number[0] in SIGNALS:
            _leave(signal.Signals(number[0]).name)
    os.close(reader)


def _leave(why: str) -> None:
    say(f"told to stop by {why} before training had begun; the same command line starts it")
    os._exit(PREEMPTED)


def _ignore(number: int, frame: FrameType | None) -> None:
    """A handler, so that the interpreter hears of the signal; it does nothing itself."""


def _put_back(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        # None: it was installed by something that is not Python, which cannot be put back from here.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
