"""Standard output and error of a process: a stream that cannot be written never disturbs what the process does.

A pipe whose reader has left, a full disk, a stream that was closed before the start: print statements are everywhere,
also in libraries, and none of them may end a training or lose the result of an evaluation. What was lost is known at
the end, when the process says so by its exit code.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Any, TextIO

READER_LEFT = 128 + signal.SIGPIPE  # what a shell reports of a program that a closed pipe has ended


class Outlet(io.RawIOBase):
    """A descriptor that takes what is written to it. After the first failure, kept in `failure`, it drops the rest."""

    def __init__(self, descriptor: int) -> None:
        self.failure: OSError | None = None
        self._descriptor = descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any, /) -> int:
        size = memoryview(data).nbytes
        if self.failure is not None:
            return size
        try:
            return os.write(self._descriptor, data)
        except OSError as error:
            self.failure = error
            return size


def guard() -> Outlet:
    """Puts outlets behind `sys.stdout` and `sys.stderr`, for the rest of the process; returns that of standard output.

    A standard stream that is closed becomes the null device: otherwise the next file that is opened would get its
    number, and with it whatever is printed.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest free number: this one
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - as long as the process
    output = Outlet(1)
    sys.stdout = _text(output, sys.stdout, is_by_line=False)
    sys.stderr = _text(Outlet(2), sys.stderr, is_by_line=True)
    return output


def exit_code(code: int, output: Outlet) -> int:
    """The code a process ends with that wanted to end with `code`: another one if its output was lost. Call it last."""
    sys.stdout.flush()
    if code == 0 and isinstance(output.failure, BrokenPipeError):
        code = READER_LEFT
    elif code == 0 and output.failure is not None:
        why = output.failure.strerror
        print(f"distvsd: error: standard output cannot be written ({why}); free space there", file=sys.stderr)
        code = 1
    sys.stderr.flush()
    return code


def _text(outlet: Outlet, before: TextIO | None, is_by_line: bool) -> TextIO:
    """A text stream like the one before, None where it was closed; letters that it cannot write become escapes."""
    encoding = "utf-8"
    if isinstance(before, io.TextIOWrapper):
        is_by_line = before.line_buffering or before.write_through
        encoding = before.encoding
    return io.TextIOWrapper(io.BufferedWriter(outlet), encoding, "backslashreplace", line_buffering=is_by_line)
