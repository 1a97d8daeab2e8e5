"""`distvsd verify`: whether every checkpoint of a run is sound, and the digest of the newest one's state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from distvsd.checkpoint.format import component, content_digest, folder_name, whole_digest
from distvsd.checkpoint.reader import Checkpoint, open_checkpoint, steps
from distvsd.errors import CheckpointError


def verify_run(
    run: Path, digest: bool = False, problems_of: Callable[[Checkpoint], list[str]] = Checkpoint.problems
) -> list[str]:
    """Checks every file of every checkpoint of a run and returns the lines to print. Reads only; one process.

    problems_of: finds the problems of a checkpoint. The default checks what does not depend on the run's configuration.

    Without `digest`: one line a checkpoint. With it: for the newest checkpoint one line a component with the SHA-256 of
    its tensors (`format.content_digest`), and the digest of all last. Equal states have equal digests, whatever the
    number of ranks, the folder, the time or the configuration. Raises CheckpointError with every problem of every
    checkpoint.
    """
    checkpoints = run / "checkpoints"
    found = steps(checkpoints)
    if not found:
        raise CheckpointError(f"{checkpoints} holds no checkpoint; is {run} the directory of a run (run.dir)?")
    sound: list[Checkpoint] = []
    problems: list[str] = []
    for step in found:
        try:
            checkpoint = open_checkpoint(checkpoints, step)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        wrong = problems_of(checkpoint)
        problems += wrong
        sound += [] if wrong else [checkpoint]
    if problems:
        raise CheckpointError(
            f"{len(problems)} problems in the {len(found)} checkpoints of {run}: {'; '.join(problems)}"
        )
    return _digest_lines(sound[0]) if digest else [_line(checkpoint) for checkpoint in sound]


def _line(checkpoint: Checkpoint) -> str:
    manifest = checkpoint.manifest
    count, size = len(manifest.files), sum(entry.bytes for entry in manifest.files.values())
    return f"{folder_name(manifest.step)} sound: {len(manifest.particles)} particles, {count} files, {size} bytes"


def _digest_lines(checkpoint: Checkpoint) -> list[str]:
    digests: dict[str, str] = {}
    for file in checkpoint.manifest.files:
        if name := component(file):
            digests[name] = content_digest(checkpoint.read(file))
    if wrong := [name for name in sorted(digests) if digests[name] != checkpoint.manifest.components[name]]:
        raise CheckpointError(
            f"{checkpoint.folder}: the manifest has another digest of {', '.join(wrong)} than the files: it was not "
            f"written by this program; do not use this checkpoint"
        )
    return [f"{name} {digests[name]}" for name in sorted(digests)] + [f"all {whole_digest(digests)}"]
