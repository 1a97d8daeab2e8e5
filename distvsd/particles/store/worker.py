"""One background thread that does jobs in the order in which they are given."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Result = TypeVar("Result")
PATIENCE_S = 60.0  # with the jobs that are left at the end: a disk may hang


class Job(Generic[Result]):
    """A function that is called once, and its result."""

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work = work
        self._ended = threading.Event()
        self._result: list[Result] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._result.append(self._work())
        except BaseException as error:
            self._error = error
        self._ended.set()

    def result(self) -> Result:
        """Waits until it was called; returns what it returned, or raises what it raised."""
        self._ended.wait()
        if self._error is not None:
            raise self._error
        return self._result[0]


class Worker:
    """The thread is a daemon: a process that has lost the other ranks must be able to exit although its disk hangs."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Job[object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=_work, args=(self._jobs,), name=name, daemon=True)
        self._thread.start()

    def do(self, work: Callable[[], Result]) -> Job[Result]:
        """Calls the function after all that were given before."""
        job = Job(work)
        self._jobs.put(job)  # type: ignore[arg-type]
        return job

    def close(self) -> None:
        """Ends the thread after the jobs that it has; waits a while for them."""
        self._jobs.put(None)
        self._thread.join(PATIENCE_S)


def _work(jobs: queue.SimpleQueue[Job[object] | None]) -> None:
    while (job := jobs.get()) is not None:
        job.run()
        del job  # what it refers to must not live until the next one comes
