"""Writing checkpoints: staged beside their place, renamed into it, then the old ones pruned. One process, no ranks.

Crash consistency follows from the order of the writes, see docs/checkpoint-format.md.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Final

from distvsd.checkpoint.format import MANIFEST, FileEntry, Manifest, folder_name, particle_of, step_of
from distvsd.checkpoint.reader import Checkpoint, open_checkpoint, steps
from distvsd.errors import CheckpointError
from distvsd.faults import fault

_log = logging.getLogger("distvsd")

# Readers ignore names with a leading dot.
_STAGED: Final = ".staged-"
_REPLACED: Final = ".replaced-"
_REMOVED: Final = ".removed-"
_RESERVED: Final = ".reserved-"
_FOLDERS: Final = ("particles", "score")


def stage(checkpoints: Path, step: int) -> Path:
    """A new, empty folder for a checkpoint that is being written. Raises OSError."""
    fault("save.stage")
    checkpoints.mkdir(parents=True, exist_ok=True)
    staging = checkpoints / f"{_STAGED}{folder_name(step)}-{uuid.uuid4().hex}"
    staging.mkdir()
    for folder in _FOLDERS:
        (staging / folder).mkdir()
    return staging


def write_file(staging: Path, file: str, data: bytes) -> FileEntry:
    """Writes one new file, forces it to the disk and reads it back. Raises OSError, also if the file exists."""
    particle = particle_of(file)
    ids = () if particle is None else (particle,)
    fault("save.write", ids)
    entry = FileEntry(hashlib.sha256(data).hexdigest(), len(data))
    with (staging / file).open("xb") as stream:
        stream.write(data)
        stream.flush()
        fault("save.flush", ids)
        os.fsync(stream.fileno())
    _read_back(staging / file, entry)
    return entry


def publish(staging: Path, manifest: Manifest) -> Path:
    """Adds the manifest to a staged checkpoint and renames it into place; from then on it survives a power cut.

    A checkpoint of the same step is moved aside first, and deleted after the new one was verified in its place. After
    an error nothing is published and everything is where it was. Raises OSError, and CheckpointError if the files in
    the folder are not those of the manifest.
    """
    checkpoints = staging.parent
    problems = Checkpoint(staging, manifest).layout_problems()
    if problems:
        raise CheckpointError(
            f"what all ranks wrote is not what rank 0 sees, first {problems[0]}; the run directory must lie on a file "
            f"system that every rank shares"
        )
    fault("save.manifest")
    write_file(staging, MANIFEST, manifest.encode())
    for folder in (*_FOLDERS, "."):
        sync_folder(staging / folder)
    fault("save.rename")
    place = checkpoints / folder_name(manifest.step)
    aside = None
    if os.path.lexists(place):
        aside = checkpoints / f"{_REPLACED}{place.name}-{uuid.uuid4().hex}"
        place.rename(aside)
    try:
        if aside is not None:
            fault("save.swap")
        staging.rename(place)
        fault("save.published")
        sync_folder(checkpoints)
        _verify_published(checkpoints, manifest)
    except OSError:
        if not os.path.lexists(staging):
            place.rename(staging)
        if aside is not None:
            aside.rename(place)
        raise
    if aside is not None:
        discard(aside)
    return place


def prune(checkpoints: Path, keep: int, published: int, unsound: Collection[int] = ()) -> None:
    """Deletes checkpoints older than the `keep` newest complete ones, never the one just published.

    Complete means a sound manifest and all files of the right size; those in `unsound` are damaged nevertheless. A
    failure to delete is only a warning. Raises OSError if the folder cannot be listed.
    """
    complete: list[int] = []
    for step in steps(checkpoints):
        if len(complete) >= keep and step != published:
            # Renamed first: a half-deleted checkpoint would look like a damaged one.
            gone = checkpoints / f"{_REMOVED}{folder_name(step)}-{uuid.uuid4().hex}"
            try:
                fault("save.prune")
                (checkpoints / folder_name(step)).rename(gone)
            except OSError as error:
                _log.warning("the old checkpoint %s could not be deleted: %s", folder_name(step), error)
            else:
                discard(gone)
        elif step not in unsound and _is_complete(checkpoints, step):
            complete.append(step)


def reserve(checkpoints: Path, num_bytes: int, keep: int) -> None:
    """Checks that the disk has room for a run whose checkpoints have `num_bytes` each and of which `keep` stay.

    While one is written there are `keep` + 1; existing ones count. The free space must hold the rest. A quota does not
    show in the free space, so a file of one checkpoint's size is allocated and deleted. Raises CheckpointError with the
    bytes needed and free.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    there = sum(_is_complete(checkpoints, step) for step in steps(checkpoints))
    missing = max(1, keep + 1 - there)
    free = shutil.disk_usage(checkpoints).free
    dummy = checkpoints / f"{_RESERVED}{uuid.uuid4().hex}"
    reason = ""
    if free >= missing * num_bytes:
        try:
            with dummy.open("xb") as stream:
                os.posix_fallocate(stream.fileno(), 0, num_bytes)
            return
        except OSError as error:
            missing, reason = 1, f" ({error.strerror})"
        finally:
            dummy.unlink(missing_ok=True)
    raise CheckpointError(
        f"the disk of {checkpoints} is too small: {missing * num_bytes} bytes are needed for {missing} more "
        f"checkpoint{'s' if missing > 1 else ''} of {num_bytes} bytes (checkpoint.keep is {keep}, and one is written "
        f"beside those), and {free} are free{reason}; make room, raise the quota, lower checkpoint.keep or "
        f"particles.count, or choose another run.dir"
    )


def recover(checkpoints: Path) -> None:
    """Cleans up after a run that died in a save. Only the holder of the run's lock may call it, before its first save.

    A checkpoint that was moved aside goes back if its place is empty; every other unfinished folder is deleted.
    """
    if not checkpoints.is_dir():
        return
    for name in sorted(path.name for path in checkpoints.iterdir()):
        if name.startswith(_REPLACED):
            place = checkpoints / name.removeprefix(_REPLACED).rpartition("-")[0]
            if step_of(place.name) is not None and not os.path.lexists(place):
                (checkpoints / name).rename(place)
                sync_folder(checkpoints)
        if name.startswith((_STAGED, _REPLACED, _REMOVED, _RESERVED)):
            discard(checkpoints / name)


def discard(folder: Path) -> None:
    """Deletes an unused folder, if it exists. A failure is only a warning; `recover` tries again."""
    try:
        if not os.path.lexists(folder):
            return
        fault("save.discard")
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
        else:
            folder.unlink()
    except OSError as error:
        _log.warning("the unused folder %s could not be deleted: %s", folder, error)


def sync_folder(folder: Path) -> None:
    """Forces the entries of a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_complete(checkpoints: Path, step: int) -> bool:
    try:
        return not open_checkpoint(checkpoints, step).layout_problems()
    except CheckpointError:
        return False


def _read_back(path: Path, entry: FileEntry) -> None:
    """Raises OSError unless the disk returns the bytes that were written."""
    with path.open("rb") as stream:
        # Drops the cached pages, so that the bytes come from the disk. Only advice to the kernel: a file system in
        # memory has nowhere else to read from.
        with contextlib.suppress(OSError):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != entry.sha256:
        raise OSError(errno.EIO, "the disk returns other bytes than were written to it", str(path))


def _verify_published(checkpoints: Path, manifest: Manifest) -> None:
    """Raises OSError unless readers find the manifest and files of the right size. Content was checked by
    `_read_back`."""
    try:
        found = open_checkpoint(checkpoints, manifest.step)
        problems = [] if found.manifest == manifest else ["it has another manifest"]
        problems += found.layout_problems()
    except CheckpointError as error:
        problems = [str(error)]
    if problems:
        raise OSError(errno.EIO, f"what was published is not what was written: {problems[0]}")
