"""metrics.jsonl and health.jsonl: one JSON object a line, appended by rank 0, cut back to a checkpoint on resume."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from distvsd.errors import RunError
from distvsd.faults import fault
from distvsd.runtime import inside

_log = logging.getLogger("distvsd")


class JsonLines:
    """An append-only file of JSON objects. Each line reaches the system in one write: a killed run leaves whole lines.

    A line that cannot be written (a full disk) is dropped and counted in `dropped`, with one warning; it does not end
    the run. `bytes` is the length of the file, for the manifest of a checkpoint.
    """

    def __init__(self, path: Path, keep_bytes: int | None = None) -> None:
        """Opens the file, or makes it. keep_bytes: the length that the resumed checkpoint recorded. What lies beyond
        was written after that checkpoint and will be written again, so it is cut off. None keeps every whole line.
        Raises RunError."""
        self._path, self.dropped = path, 0
        # Not opened for appending: lines go to `bytes`, also after a cut.
        self._handle = inside.open_file(path.parent, path.name)
        try:
            self.bytes = self._cut(keep_bytes)
        except OSError as error:
            os.close(self._handle)
            raise RunError(f"{path} cannot be written to ({error}); choose another run.dir") from error

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one line. Numbers that are not finite become null. Raises RunError for what is not JSON."""
        try:
            line = json.dumps(_finite(record), allow_nan=False).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise RunError(f"{self._path}: {error}; log numbers, texts, lists and objects of them") from error
        try:
            fault("telemetry")
            if os.pwrite(self._handle, line, self.bytes) != len(line):
                raise OSError("the disk took half of a line")
            self.bytes += len(line)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, self.bytes)
            if not self.dropped:
                _log.warning("%s cannot be written, lines are dropped: %s", self._path, error)
            self.dropped += 1

    def close(self) -> None:
        """Forces the lines to the disk and closes the file. May be called again."""
        handle, self._handle = self._handle, -1
        for act in (os.fsync, os.close) if handle >= 0 else ():
            try:
                act(handle)
            except OSError as error:  # a network file system may report a full disk only here
                _log.warning("%s may have lost its last lines: %s", self._path, error)

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _cut(self, keep_bytes: int | None) -> int:
        size = os.fstat(self._handle).st_size
        keep = size if keep_bytes is None else min(keep_bytes, size)
        if keep_bytes is not None and size < keep_bytes:
            _log.warning("%s has %d bytes and the checkpoint counted %d: lines were lost", self._path, size, keep_bytes)
        end = 0
        while keep and not end:  # drops the part of a line that a power cut may have left, however long
            start = max(0, keep - _PART)
            end = os.pread(self._handle, keep - start, start).rfind(b"\n") + 1
            keep = start + end
        os.ftruncate(self._handle, keep)
        return keep


_PART = 2**20


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): _finite(entry) for key, entry in value.items()}
        case list() | tuple():
            return [_finite(entry) for entry in value]
    return value
