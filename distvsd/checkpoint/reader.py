"""Reading checkpoints: which exist, whether they are sound, their content. Changes nothing; one process, no ranks."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from torch import Tensor

from distvsd.checkpoint.format import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    Manifest,
    NewerFormatError,
    as_safetensors,
    decode_manifest,
    decode_tensors,
    folder_name,
    step_of,
)
from distvsd.errors import CheckpointError
from distvsd.faults import fault

_log = logging.getLogger("distvsd")
_CHANGED: Final = "does not match its SHA-256: it was damaged or changed after it was written"


class Contents(Protocol):
    """Checks that a run can resume from a checkpoint. Both methods raise CheckpointError if it cannot."""

    def refuse_manifest(self, manifest: Manifest) -> None: ...

    def refuse_file(self, manifest: Manifest, file: str, tensors: Mapping[str, Tensor]) -> None: ...


@dataclass
class Findings:
    """Sentences. damaged: about files that changed after they were written. unfit: about intact files from which this
    run cannot resume."""

    damaged: list[str] = field(default_factory=list)
    unfit: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint with a sound manifest. Files are verified when they are read, or by `problems`."""

    folder: Path
    manifest: Manifest

    def read(self, file: str) -> dict[str, Tensor]:
        """The tensors of one file, on the CPU, from the bytes that were verified. Raises CheckpointError."""
        return decode_tensors(self._bytes(file), str(self.folder / file))

    def layout_problems(self) -> list[str]:
        """Files that are missing, extra, of another size or not regular files, one sentence each. Reads no content."""
        found, problems = _walk(self.folder)
        expected = self.manifest.files
        problems += [_advice(self.folder / file, "is missing") for file in sorted(expected.keys() - found.keys())]
        problems += [
            f"{self.folder / file} is not named in the manifest: nothing reads it; delete it, or find out who wrote it"
            for file in sorted(found.keys() - expected.keys() - {MANIFEST})
        ]
        problems += [
            _advice(self.folder / file, f"has {found[file]} bytes instead of {expected[file].bytes}")
            for file in sorted(expected.keys() & found.keys())
            if found[file] != expected[file].bytes
        ]
        return problems

    def examine(self, files: Iterable[str], contents: Contents | None = None) -> Findings:
        """Checks `files`, one at a time: their SHA-256 and, for tensors, whether they fit `contents`."""
        findings = Findings()
        for file in files:
            try:
                self._hash(file)
                if contents is None or not file.endswith(".safetensors"):
                    continue
                tensors = self._mapped(file)
            except CheckpointError as error:
                findings.damaged.append(str(error))
                continue
            try:
                contents.refuse_file(self.manifest, file, tensors)
            except CheckpointError as error:
                findings.unfit.append(f"{self.folder / file}: {error}")
        return findings

    def examine_manifest(self, contents: Contents) -> list[str]:
        """Why this run cannot resume from the manifest, at most one sentence."""
        try:
            contents.refuse_manifest(self.manifest)
        except CheckpointError as error:
            return [f"{self.folder}: {error}"]
        return []

    def problems(self, contents: Contents | None = None) -> list[str]:
        """All problems of the files, none for a sound checkpoint. Reads every file."""
        found, _ = _walk(self.folder)
        readable = [file for file, entry in sorted(self.manifest.files.items()) if found.get(file) == entry.bytes]
        findings = self.examine(readable, contents)
        unfit = (self.examine_manifest(contents) if contents is not None else []) + findings.unfit
        return self.layout_problems() + findings.damaged + unfit

    def _hash(self, file: str) -> None:
        """Raises CheckpointError if a file does not match its SHA-256. Does not keep it in memory."""
        with _reading(self.folder, file) as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != self.manifest.files[file].sha256:
            raise CheckpointError(_advice(self.folder / file, _CHANGED))

    def _mapped(self, file: str) -> dict[str, Tensor]:
        """The tensors mapped from the disk, to look at values without a copy. Not verified; a run uses `read`."""
        import safetensors

        path = self.folder / file
        with _reading(self.folder, file), as_safetensors(str(path)), safetensors.safe_open(path, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dictionary

    def _bytes(self, file: str) -> bytes:
        entry = self.manifest.files.get(file)
        if entry is None:
            raise CheckpointError(f"{self.folder} holds no {file}; it holds {', '.join(sorted(self.manifest.files))}")
        path = self.folder / file
        with _reading(self.folder, file) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size != entry.bytes:
                raise CheckpointError(_advice(path, f"has {size} bytes instead of {entry.bytes}"))
            data = stream.read(size)
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise CheckpointError(_advice(path, _CHANGED))
        return data


def steps(checkpoints: Path) -> list[int]:
    """The steps of the published checkpoints, newest first, sound or not. Only exact folder names count."""
    if not checkpoints.is_dir():
        return []
    found = (step_of(path.name) for path in checkpoints.iterdir())
    return sorted((step for step in found if step is not None), reverse=True)


def open_checkpoint(checkpoints: Path, step: int) -> Checkpoint:
    """The checkpoint after `step` rounds; verifies its manifest but not its files. Raises CheckpointError."""
    folder = checkpoints / folder_name(step)
    path = folder / MANIFEST
    if folder.is_symlink():
        raise CheckpointError(f"{folder} is a symbolic link; put the checkpoint itself there")
    with _reading(folder, MANIFEST) as stream:
        if os.fstat(stream.fileno()).st_size > MAX_MANIFEST_BYTES:
            raise CheckpointError(_advice(path, f"is larger than {MAX_MANIFEST_BYTES} bytes"))
        data = stream.read()
    manifest = decode_manifest(data, str(path))
    if manifest.step != step:
        raise CheckpointError(f"{path} is of step {manifest.step}: the folder was renamed; rename it back")
    return Checkpoint(folder, manifest)


def newest(checkpoints: Path) -> Checkpoint | None:
    """The newest sound checkpoint, every file verified; a warning in the log names each newer one that is not.

    None if there is no checkpoint at all. Raises CheckpointError if there are some and none is sound, so that no run
    silently starts anew, and if the newest was written by a newer program.
    """
    skipped: list[str] = []
    for step in steps(checkpoints):
        try:
            checkpoint = open_checkpoint(checkpoints, step)
            problems = checkpoint.problems()
        except NewerFormatError:
            raise
        except CheckpointError as error:
            problems = [str(error)]
        if not problems:
            return checkpoint
        skipped.append(skipping(step, problems))
        _log.warning(skipped[-1])
    raise_if_none_is_sound(checkpoints, skipped)
    return None


def skipping(step: int, problems: list[str]) -> str:
    """The warning about a checkpoint that is skipped for an older one."""
    return f"checkpoint {folder_name(step)} is skipped: {'; '.join(problems)}"


def raise_if_none_is_sound(checkpoints: Path, skipped: list[str]) -> None:
    """Raises CheckpointError if checkpoints were found and every one was skipped."""
    if skipped:
        raise CheckpointError(
            f"none of the {len(skipped)} checkpoints in {checkpoints} is sound: restore one from a copy, or delete "
            f"them to start anew. {' '.join(skipped)}"
        )


@contextmanager
def _reading(folder: Path, file: str) -> Iterator[io.BufferedReader]:
    """Opens a regular file of a checkpoint without following links; every failure is a CheckpointError."""
    path = folder / file
    try:
        fault("load.read")
        for part in [*reversed(path.relative_to(folder).parents)][1:]:
            if (folder / part).is_symlink():
                raise CheckpointError(_advice(folder / part, "is a symbolic link"))
        # Non-blocking: opening a named pipe in the place of a file would wait for ever.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise CheckpointError(_advice(path, "is not a regular file"))
        with os.fdopen(handle, "rb") as stream:
            yield stream
    except FileNotFoundError as error:
        raise CheckpointError(_advice(path, "is missing")) from error
    except OSError as error:
        raise CheckpointError(_advice(path, f"cannot be read ({error.strerror})")) from error


def _walk(folder: Path) -> tuple[dict[str, int], list[str]]:
    """Sizes of the regular files below a folder by relative name, and a sentence for everything but files and
    folders."""
    found: dict[str, int] = {}
    problems: list[str] = []
    pending = [""]
    while pending:
        below = pending.pop()
        try:
            entries = sorted(os.scandir(folder / below), key=lambda entry: entry.name)
            for entry in entries:
                name = f"{below}{entry.name}"
                mode = entry.stat(follow_symlinks=False).st_mode
                if stat.S_ISDIR(mode):
                    pending.append(f"{name}/")
                elif stat.S_ISREG(mode):
                    found[name] = entry.stat(follow_symlinks=False).st_size
                else:
                    kind = "a symbolic link" if stat.S_ISLNK(mode) else "a special file"
                    problems.append(_advice(folder / name, f"is {kind} and not a file"))
        except OSError as error:
            problems.append(_advice(folder / below, f"cannot be listed ({error})"))
    return found, problems


def _advice(path: Path, what: str) -> str:
    return f"{path} {what}; restore it from a copy, or delete the whole checkpoint to continue from an older one"
