"""Writing checkpoints: staged beside their place, renamed into it, pruned after. One process, no ranks.

The order of the writes is the argument for crash consistency, made in docs/checkpoint-format.md.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import uuid
from pathlib import Path
from typing import Final

from distvsd.checkpoint.format import MANIFEST, FileEntry, Manifest, folder_name, step_of
from distvsd.checkpoint.reader import Checkpoint, open_checkpoint, steps
from distvsd.errors import CheckpointError

_log = logging.getLogger("distvsd")

# No reader takes a name with a leading dot for a checkpoint.
_STAGED: Final = ".staged-"
_REPLACED: Final = ".replaced-"
_REMOVED: Final = ".removed-"
_FOLDERS: Final = ("particles", "score")


def stage(checkpoints: Path, step: int) -> Path:
    """A new, empty folder for a checkpoint that is being written. Raises OSError."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    staging = checkpoints / f"{_STAGED}{folder_name(step)}-{uuid.uuid4().hex}"
    staging.mkdir()
    for folder in _FOLDERS:
        (staging / folder).mkdir()
    return staging


def write_file(staging: Path, file: str, data: bytes) -> FileEntry:
    """Writes one new file and forces it to the disk. Raises OSError, also where the file exists."""
    with (staging / file).open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return FileEntry(hashlib.sha256(data).hexdigest(), len(data))


def publish(staging: Path, manifest: Manifest) -> Path:
    """Completes a staged checkpoint by its manifest and renames it into place; afterwards it survives a power cut.

    A checkpoint of the same step is swapped aside first and deleted last. Raises OSError, and CheckpointError when the
    files in the folder are not those of the manifest; nothing is published then.
    """
    checkpoints = staging.parent
    problems = Checkpoint(staging, manifest).layout_problems()
    if problems:
        raise CheckpointError(
            f"what all ranks wrote is not what rank 0 sees, first {problems[0]}; the run directory must lie on a file "
            f"system that every rank shares"
        )
    write_file(staging, MANIFEST, manifest.encode())
    for folder in (*_FOLDERS, "."):
        sync_folder(staging / folder)
    place = checkpoints / folder_name(manifest.step)
    aside = None
    if os.path.lexists(place):
        aside = checkpoints / f"{_REPLACED}{place.name}-{uuid.uuid4().hex}"
        place.rename(aside)
    try:
        staging.rename(place)
    except OSError:
        if aside is not None:
            aside.rename(place)
        raise
    sync_folder(checkpoints)
    if aside is not None:
        discard(aside)
    return place


def prune(checkpoints: Path, keep: int, published: int) -> None:
    """Deletes what is older than the `keep` newest complete checkpoints, never the one just published.

    Complete means a sound manifest and all files at their sizes. A failure to delete is a warning: it loses nothing.
    """
    complete: list[int] = []
    for step in steps(checkpoints):
        if len(complete) >= keep and step != published:
            # Renamed first, so that a half-deleted checkpoint is never taken for a damaged one.
            gone = checkpoints / f"{_REMOVED}{folder_name(step)}-{uuid.uuid4().hex}"
            try:
                (checkpoints / folder_name(step)).rename(gone)
            except OSError as error:
                _log.warning("the old checkpoint %s could not be deleted: %s", folder_name(step), error)
            else:
                discard(gone)
        elif _is_complete(checkpoints, step):
            complete.append(step)


def recover(checkpoints: Path) -> None:
    """Cleans up after a run that died in a save: for the one process that holds the run's lock, before its first save.

    A checkpoint that was swapped aside goes back if its place is empty; every other unfinished folder is deleted.
    """
    if not checkpoints.is_dir():
        return
    for name in sorted(path.name for path in checkpoints.iterdir()):
        if name.startswith(_REPLACED):
            place = checkpoints / name.removeprefix(_REPLACED).rpartition("-")[0]
            if step_of(place.name) is not None and not os.path.lexists(place):
                (checkpoints / name).rename(place)
                sync_folder(checkpoints)
        if name.startswith((_STAGED, _REPLACED, _REMOVED)):
            discard(checkpoints / name)


def discard(folder: Path) -> None:
    """Deletes an unpublished folder if it is there; a failure is a warning, `recover` tries again at the next start."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        _log.warning("the unused folder %s could not be deleted: %s", folder, error)


def sync_folder(folder: Path) -> None:
    """Forces a folder's entries to the disk."""
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
