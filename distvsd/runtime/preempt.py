"""Signals as requests: a scheduler or a person asks a run to end, and it ends after the round with its work saved.

A handler only notes the request. Whether any rank was asked is agreed by all of them after each round, so that it is
enough for the signal to reach a single rank.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Final

SIGNALS: Final = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

# A terminal and Slurm signal the launcher and its workers, and the launcher then forwards what it got: two arrivals of
# one request, a moment apart. Only a later one is somebody who does not want to wait.
ECHO_S: Final = 2.0


class Preemption:
    """While entered, SIGTERM, SIGUSR1 and SIGINT are noted in `requested` instead of ending the process.

    A second signal of a kind, more than `ECHO_S` after the first, ends the process at once: KeyboardInterrupt for
    SIGINT, exit code 128 + number without any tidying up for the others. Python runs handlers on the main thread
    only, between two of its own steps: during one long call into a library a signal is noted when that returns. Entered
    on another thread it touches no signals, and `request` is the only way in. Leaving puts the old handlers back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: seconds."""
        self.requested: str | None = None
        self._clock = clock
        self._first: dict[int, float] = {}
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # None: it was installed by something that is not Python, which cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

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
