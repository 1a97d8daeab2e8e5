"""Standard output and error of a process that stay usable when they cannot be written.

The reader of a pipe may leave, a disk may be full, a stream may be closed from the start. Prints are everywhere, also
in libraries, and none may end a training or lose the result of an evaluation. The exit code says at the end that output
was lost.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Any, TextIO

READER_LEFT = 128 + signal.SIGPIPE  # what a shell reports of a program ended by a closed pipe


class Outlet(io.RawIOBase):
    """A stream to a descriptor. After the first failure, kept in `failure`, it drops everything."""

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
    """Puts an Outlet behind `sys.stdout` and `sys.stderr` for the rest of the process; returns that of standard output.

    A closed standard stream is opened as the null device: otherwise the next file to be opened would get its number,
    and everything that is printed.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number, which is this one
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - as long as the process
    output = Outlet(1)
    sys.stdout = _text(output, sys.stdout, is_by_line=False)
    sys.stderr = _text(Outlet(2), sys.stderr, is_by_line=True)
    return output


def exit_code(code: int, output: Outlet) -> int:
    """The exit code of the process: `code`, or another one if output was lost. Call it last."""
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
    """A text stream like `before` (None if that was closed); characters that it cannot encode become escapes."""
    encoding = "utf-8"
    if isinstance(before, io.TextIOWrapper):
        is_by_line = before.line_buffering or before.write_through
        encoding = before.encoding
    return io.TextIOWrapper(io.BufferedWriter(outlet), encoding, "backslashreplace", line_buffering=is_by_line)
