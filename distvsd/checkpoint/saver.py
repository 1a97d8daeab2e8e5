"""Saving and loading by all ranks: each writes and reads its own particles; rank 0 decides and publishes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from distvsd.checkpoint import reader, store
from distvsd.checkpoint.compose import compose, frozen_metadata, plain
from distvsd.checkpoint.format import NewerFormatError, folder_name, is_file_name, particle_of
from distvsd.checkpoint.ranks import StorageError, owners_of, refuse_drift, together
from distvsd.checkpoint.snapshot import HostCopies, OnDemand
from distvsd.checkpoint.writer import Writer, write_share
from distvsd.errors import CheckpointError
from distvsd.parallel.world import World

_log = logging.getLogger("distvsd")

# For the manifest and the headers of the tensor files.
_MARGIN_BYTES: Final = 2**20


# Tensors by name by file name, at once or one file after the other.
Files = Mapping[str, Mapping[str, Tensor]] | Iterable[tuple[str, Mapping[str, Tensor]]]


@dataclass(frozen=True)
class _Part:
    """This rank's part of a checkpoint. What is written later was copied, so later changes by the caller do not reach
    it."""

    step: int
    files: Mapping[str, Mapping[str, Tensor]]
    texts: dict[str, str]
    health: dict[str, Any]
    metadata: dict[str, Any]


@dataclass(frozen=True)
class _Save:
    """A save in progress on one rank: its part, the folder, the thread that writes."""

    part: _Part
    staging: Path
    writer: Writer


class Saver:
    """The checkpoints of one run. Everything not called local is collective: all ranks call it in the same order, and
    either all of them return or all raise the same CheckpointError.

    A save has two parts. `begin` copies the state into host memory, and a thread of each rank starts to write it; where
    saves are not asynchronous it writes at once, one file after the other. `finish` waits for the threads, compares
    their reports, and publishes. A failing disk loses that save only. Failures are counted, and the run may continue
    until `max_failures` saves in a row have failed.

    The constructor deletes the unfinished saves of a dead run, so only the holder of the run's lock may call it. To
    read a run that may be alive use `reader.newest`.
    """

    def __init__(
        self, checkpoints: Path, world: World, keep: int = 2, asynchronous: bool = False, max_failures: int = 3
    ) -> None:
        """checkpoints: their folder, on a file system that all ranks share. keep: how many complete ones stay, at least
        2, because the newest may turn out to be damaged. asynchronous: `begin` returns before the files are written."""
        if keep < 2:
            raise CheckpointError(f"checkpoint.keep is {keep}; at least 2 must stay, in case one is damaged")
        self._checkpoints, self._world, self._keep = checkpoints, world, keep
        self.asynchronous, self._max_failures = asynchronous, max_failures
        self._copies = HostCopies()
        self._save: _Save | None = None
        self._staging: Path | None = None  # on rank 0: the folder that is not published yet
        self._unsound: set[int] = set()
        self._failures, self._last_failure = 0, ""
        self._together("clearing away unfinished checkpoints", self._lead(lambda: store.recover(checkpoints)))

    @property
    def writing(self) -> bool:
        """Whether this rank still writes files. Local; may differ between ranks."""
        return self._save is not None and self._save.writer.is_busy

    @property
    def pending(self) -> int | None:
        """The step whose save has begun and is not finished. Local; the same on all ranks."""
        return None if self._save is None else self._save.part.step

    @property
    def failures(self) -> int:
        """How many saves have failed since the last success. Local; the same on all ranks."""
        return self._failures

    @property
    def last_failure(self) -> str:
        """Why the newest failed save failed, "" if none has. Local; the same on all ranks."""
        return self._last_failure

    def preflight(self, num_bytes: int) -> None:
        """Raises CheckpointError unless the disk has room for the run's checkpoints. num_bytes: size of this rank's
        part."""
        action = "reserving space for checkpoints"
        total = sum(self._together(action, lambda: num_bytes)) + _MARGIN_BYTES
        self._together(action, self._lead(lambda: store.reserve(self._checkpoints, total, self._keep)))

    def begin(
        self,
        step: int,
        files: Files,
        texts: Mapping[str, str],
        metadata: Mapping[str, Any],
        health: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> None:
        """Starts to save the state after `step` rounds, as it is at this moment.

        First finishes the save before, if it is in progress; also finishes this one unless `asynchronous`. files,
        texts: what this rank holds, by the file names of docs/checkpoint-format.md. Files may come as a stream, each
        copied before the next is asked for, or `OnDemand`: then a save that is not asynchronous has the tensors of one
        file in memory at a time. Each particle comes from one rank.
        A `score/` file may come from several: the lowest rank writes it, and different content on another rank is an
        error, which finds drifted replicas. health: JSON by particle id, for the particles in `files`. metadata: rank
        0's is used; config, config_digest, prior_identity, metrics_bytes, and any further JSON. Raises CheckpointError
        for what a checkpoint cannot hold, and after `max_failures` failed saves in a row.
        """
        self.finish()
        action = f"saving {folder_name(step)}"
        parts: list[_Part] = []

        def announce() -> dict[str, Any]:
            part = self._copy(step, files, texts, metadata, health or {})
            parts.append(part)
            return {"step": step, "files": sorted((*part.files, *texts)), "staging": self._stage(step)}

        try:
            opened = self._together(action, announce)
            owners = owners_of(action, opened)
        except StorageError as error:
            self._discard()
            self._fail(error)
            return
        except CheckpointError:
            self._discard()
            raise
        part, staging = parts[0], self._checkpoints / opened[0]["staging"]
        owned = frozenset(file for file, owner in owners.items() if owner == self._world.rank)
        writer = Writer(lambda: write_share(staging, owned, part.files, part.texts), beside=self.asynchronous)
        self._save = _Save(part, staging, writer)
        if not self.asynchronous:
            self.finish()

    def finish(self) -> Path | None:
        """Waits until all ranks have written, publishes the checkpoint, verifies it, and deletes the oldest.

        Returns its folder; None if no save was in progress, or if this one failed. Raises CheckpointError if replicas
        have drifted apart, and after `max_failures` failed saves in a row.
        """
        save = self._save
        if save is None:
            return None
        step = save.part.step
        action = f"saving {folder_name(step)}"
        try:
            written = self._together(action, lambda: save.writer.result() | {"health": save.part.health})
            refuse_drift(action, [report["content"] for report in written])
            self._together(action, self._lead(lambda: self._publish(save, written)))
        except StorageError as error:
            self._fail(error)
            return None
        finally:
            self._save = None
            self._discard()
        self._failures = 0
        self._unsound.discard(step)
        return self._checkpoints / folder_name(step)

    def load(self, step: int | None = None, contents: reader.Contents | None = None) -> reader.Checkpoint | None:
        """The checkpoint of `step`, or the newest sound one; all ranks get the same, every file of it verified.

        contents: what it must hold. A checkpoint that is intact but does not hold it is an error and is not skipped:
        the cause is the configuration, or a file of another run, and an older checkpoint would only lose rounds.

        The ranks divide the verification among themselves; later each `read`s what it needs without communication. Rank
        0 logs a warning for each newer checkpoint that is not sound. None if there is none at all. Raises
        CheckpointError if none is sound or the requested one is missing, and NewerFormatError as `reader.newest` does.
        """
        found = self._together("listing the checkpoints", self._lead(lambda: reader.steps(self._checkpoints)))[0]
        if step is not None and step not in found:
            there = ", ".join(map(folder_name, found)) or "none"
            raise CheckpointError(f"{self._checkpoints} holds no {folder_name(step)}; there are: {there}")
        skipped: list[str] = []
        for candidate in found if step is None else [step]:
            checkpoint, problems = self._examine(candidate, contents)
            if checkpoint is not None and not problems:
                return checkpoint
            if step is not None:
                raise CheckpointError(f"{folder_name(step)} cannot be used: {'; '.join(problems)}")
            self._unsound.add(candidate)  # not one of the `keep` that stay
            skipped.append(reader.skipping(candidate, problems))
            self._lead(lambda: _log.warning(skipped[-1]))()
        reader.raise_if_none_is_sound(self._checkpoints, skipped)
        return None

    def _lead(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """The work on rank 0, nothing on the others."""
        return lambda: work() if self._world.rank == 0 else None

    def _together(self, action: str, work: Callable[[], Any]) -> list[Any]:
        return together(self._world, action, work)

    def _copy(
        self,
        step: int,
        files: Files,
        texts: Mapping[str, str],
        metadata: Mapping[str, Any],
        health: Mapping[int, Mapping[str, Any]],
    ) -> _Part:
        """The part of this rank, checked. Overwrites the copies of the save before, which must be finished."""
        if self.asynchronous or not isinstance(files, OnDemand):
            files = self._copies.take(files.items() if isinstance(files, Mapping) else files)
        for name in (*files, *texts):
            if not is_file_name(name) or name.endswith(".json") != (name in texts):
                raise CheckpointError(
                    f"{name!r:.120} is not the name of a file in a checkpoint; see checkpoint-format.md"
                )
        held = [particle for file in files if (particle := particle_of(file)) is not None]
        records = plain({str(particle): health.get(particle, {}) for particle in held}, "the health of particles")
        frozen = frozen_metadata(metadata) if self._world.rank == 0 else {}
        return _Part(step, files, dict(texts), records, frozen)

    def _stage(self, step: int) -> str | None:
        """Makes the folder of a new checkpoint, on rank 0, and returns its name."""
        if self._world.rank != 0:
            return None
        self._staging = store.stage(self._checkpoints, step)
        return self._staging.name

    def _publish(self, save: _Save, written: Sequence[Mapping[str, Any]]) -> None:
        store.publish(save.staging, compose(save.part.step, self._world.size, written, save.part.metadata))
        try:
            store.prune(self._checkpoints, self._keep, save.part.step, self._unsound - {save.part.step})
        except OSError as error:  # the checkpoint is safe; the next save prunes again
            _log.warning("%s could not be searched for old checkpoints: %s", self._checkpoints, error)

    def _fail(self, error: StorageError) -> None:
        """Counts a failed save. Raises CheckpointError after `max_failures` in a row."""
        self._failures += 1
        self._last_failure = str(error)
        kept = f"the checkpoints in {self._checkpoints} are unchanged"
        if self._failures >= self._max_failures:
            raise CheckpointError(
                f"{self._failures} saves in a row failed (checkpoint.max_failures is {self._max_failures}), the "
                f"newest: {error}. {kept}; when there is room, the same command continues from them"
            ) from error
        self._lead(lambda: _log.warning("%s; failure %d in a row, %s", error, self._failures, kept))()

    def _discard(self) -> None:
        """Deletes the folder of a failed save, on rank 0. After a publication there is none: it was renamed."""
        if self._staging is not None:
            store.discard(self._staging)
            self._staging = None

    def _examine(self, step: int, contents: reader.Contents | None) -> tuple[reader.Checkpoint | None, list[str]]:
        """A checkpoint and its damages, the same on every rank; the ranks divide the files among themselves.

        Raises CheckpointError if it is intact but does not hold `contents`.
        """
        opened: list[reader.Checkpoint] = []

        def work() -> dict[str, Any]:
            try:
                checkpoint = reader.open_checkpoint(self._checkpoints, step)
            except NewerFormatError as error:
                return {"newer": str(error)}
            except CheckpointError as error:
                return {"problems": [str(error)]}
            opened.append(checkpoint)
            share = sorted(checkpoint.manifest.files)[self._world.rank :: self._world.size]
            layout = checkpoint.layout_problems()
            unfit = checkpoint.examine_manifest(contents) if contents is not None else []
            findings = checkpoint.examine([] if layout else share, None if unfit else contents)
            return {
                "problems": layout + findings.damaged,
                "unfit": unfit + findings.unfit,
                "manifest": hashlib.sha256(checkpoint.manifest.encode()).hexdigest(),
            }

        reports = self._together(f"verifying {folder_name(step)}", work)
        if newer := [report["newer"] for report in reports if "newer" in report]:
            raise NewerFormatError(newer[0])
        problems = _different(report["problems"] for report in reports)
        if not problems and len({report["manifest"] for report in reports}) > 1:
            problems = ["ranks read different manifests; the run directory must lie on a file system that all share"]
        unfit = _different(report.get("unfit", []) for report in reports)
        if unfit and not problems:
            raise CheckpointError(f"the run cannot go on from {folder_name(step)}: {'; '.join(unfit)}")
        return (opened[0] if opened else None), problems


def _different(reports: Iterable[Sequence[str]]) -> list[str]:
    """The sentences of all ranks, each once."""
    return list(dict.fromkeys(sentence for report in reports for sentence in report))
