"""Writes one rank's part of a save in a thread that uses only files: no collective, no device."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

from torch import Tensor

from distvsd.checkpoint import store
from distvsd.checkpoint.format import content_digest, encode_tensors
from distvsd.errors import CheckpointError


class Writer:
    """Runs a function once in a thread, or at once where `beside` is false, and keeps its result or error.

    The thread is a daemon: a process that has lost the other ranks must be able to exit although its disk hangs.
    """

    def __init__(self, work: Callable[[], dict[str, Any]], beside: bool = True) -> None:
        self._work = work
        self._result: dict[str, Any] | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
        if beside:
            self._thread.start()
        else:
            self._run()

    @property
    def is_busy(self) -> bool:
        """Whether the function has not ended yet."""
        return self._thread.is_alive()

    def result(self) -> dict[str, Any]:
        """Waits for the function; returns its result or raises its error."""
        if self.is_busy:
            self._thread.join()
        if self._error is not None:
            raise self._error
        if self._result is None:
            raise CheckpointError("the writer of the checkpoint ended without a result; start the run again")
        return self._result

    def _run(self) -> None:
        try:
            self._result = self._work()
        except Exception as error:  # raised again in `result`
            self._error = error


def write_share(
    staging: Path,
    owned: frozenset[str],
    files: Mapping[str, Mapping[str, Tensor]],
    texts: Mapping[str, str],
) -> dict[str, Any]:
    """Writes the files that this rank owns, with the tensors of one in memory at a time. Returns their entries, and the
    content digests of all files that it holds. Raises OSError."""
    entries: dict[str, Any] = {}
    content: dict[str, str] = {}
    for file in sorted(files):
        tensors = {name: tensor.detach().cpu() for name, tensor in files[file].items()}
        content[file] = content_digest(tensors)
        if file in owned:
            entries[file] = astuple(store.write_file(staging, file, encode_tensors(tensors, file)))
        del tensors
    for file, text in sorted(texts.items()):
        content[file] = hashlib.sha256(text.encode()).hexdigest()
        if file in owned:
            entries[file] = astuple(store.write_file(staging, file, text.encode()))
    for folder in sorted({file.partition("/")[0] for file in entries}):
        store.sync_folder(staging / folder)
    return {"entries": entries, "content": content}
