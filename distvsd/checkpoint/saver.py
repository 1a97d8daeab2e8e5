"""Saving and loading by all ranks together: each writes and reads its own particles, rank 0 decides and publishes."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from importlib import metadata as packages
from pathlib import Path
from typing import Any

from torch import Tensor

from distvsd.checkpoint import reader, store
from distvsd.checkpoint.format import (
    FileEntry,
    Manifest,
    NewerFormatError,
    ParticleEntry,
    component,
    content_digest,
    decode_manifest,
    encode_tensors,
    folder_name,
    is_file_name,
    particle_of,
)
from distvsd.errors import CheckpointError
from distvsd.parallel.collectives import gather_objects
from distvsd.parallel.world import World

_log = logging.getLogger("distvsd")
_RECORDED = ("distvsd", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")


class Saver:
    """The checkpoints of one run. Every method is collective: all ranks call it, in the same order, and either all of
    them return or all of them raise the same CheckpointError.

    Constructing one deletes what a dead run left half-written, so only the holder of the run's lock may; readers of a
    run that may be alive use `reader.newest`.
    """

    def __init__(self, checkpoints: Path, world: World, keep: int = 2) -> None:
        """checkpoints: their folder, on a file system all ranks share. keep: how many complete ones stay."""
        if keep < 1:
            raise CheckpointError(f"checkpoint.keep is {keep}; at least one checkpoint has to stay")
        self._checkpoints, self._world, self._keep = checkpoints, world, keep
        self._staging: Path | None = None
        self._together("clearing away unfinished checkpoints", self._lead(lambda: store.recover(checkpoints)))

    def save(
        self,
        step: int,
        files: Mapping[str, Mapping[str, Tensor]],
        texts: Mapping[str, str],
        metadata: Mapping[str, Any],
        health: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> Path:
        """Writes the state after `step` rounds and returns its folder; on an error nothing is published.

        files, texts: what this rank holds, by the file names of docs/checkpoint-format.md. A particle comes from one
        rank. A `score/` file may come from several: the lowest writes it, and it is an error if the others hold other
        content, which is how drifted replicas are found. health: JSON by particle id, for the particles in `files`.
        metadata: rank 0's is used; config, config_digest, prior_identity, metrics_bytes, and anything else in JSON.
        """
        action = f"saving {folder_name(step)}"
        try:
            opened = self._together(action, lambda: self._open(step, files, texts))
            staging = self._checkpoints / opened[0]["staging"]
            owners = _owners(action, opened)
            written = self._together(action, lambda: self._write(staging, owners, files, texts, health or {}))
            _refuse_drift(action, [report["content"] for report in written])
            self._together(action, self._lead(lambda: self._publish(staging, step, written, metadata)))
        finally:
            if self._staging is not None:  # on rank 0; published, it has moved away
                store.discard(self._staging)
                self._staging = None
        return self._checkpoints / folder_name(step)

    def load(self, step: int | None = None) -> reader.Checkpoint | None:
        """The checkpoint of `step`, or the newest sound one; all ranks get the same, every file of it verified.

        The ranks share the verification, and later `read` from it what each needs, without communication. Rank 0 logs a
        warning for each newer checkpoint that is not sound. None if there is none at all. Raises CheckpointError when
        none is sound, when the one asked for is not there, and NewerFormatError as `reader.newest` does.
        """
        found = self._together("listing the checkpoints", self._lead(lambda: reader.steps(self._checkpoints)))[0]
        if step is not None and step not in found:
            there = ", ".join(map(folder_name, found)) or "none"
            raise CheckpointError(f"{self._checkpoints} holds no {folder_name(step)}; there are: {there}")
        skipped: list[str] = []
        for candidate in found if step is None else [step]:
            checkpoint, problems = self._examine(candidate)
            if checkpoint is not None and not problems:
                return checkpoint
            if step is not None:
                raise CheckpointError(f"{folder_name(step)} cannot be used: {'; '.join(problems)}")
            skipped.append(reader.skipping(candidate, problems))
            self._lead(lambda: _log.warning(skipped[-1]))()
        reader.raise_if_none_is_sound(self._checkpoints, skipped)
        return None

    def _lead(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """The same work on rank 0, and none on the others."""
        return lambda: work() if self._world.rank == 0 else None

    def _together(self, action: str, work: Callable[[], Any]) -> list[Any]:
        """Every rank's result of its work, which must be JSON; any rank's failure is a CheckpointError on all."""
        value = "null"
        problem: str | None = None
        try:
            value = json.dumps(work())
        except Exception as error:  # a rank that raised here on its own would leave the others waiting for ever
            problem = _describe(error)
        reports = gather_objects(self._world, [value, problem])
        _refuse(action, [problem for _, problem in reports])
        return [json.loads(value) for value, _ in reports]

    def _open(self, step: int, files: Mapping[str, object], texts: Mapping[str, object]) -> dict[str, Any]:
        """Announces what this rank will write; rank 0 also makes the folder."""
        for name in (*files, *texts):
            if not is_file_name(name) or name.endswith(".json") != (name in texts):
                raise CheckpointError(
                    f"{name!r:.120} is not the name of a file in a checkpoint; see checkpoint-format.md"
                )
        if self._world.rank == 0:
            self._staging = store.stage(self._checkpoints, step)
        staging = self._staging.name if self._staging else None
        return {"step": step, "files": sorted((*files, *texts)), "staging": staging}

    def _write(
        self,
        staging: Path,
        owners: Mapping[str, int],
        files: Mapping[str, Mapping[str, Tensor]],
        texts: Mapping[str, str],
        health: Mapping[int, Mapping[str, Any]],
    ) -> dict[str, Any]:
        """Writes the files this rank owns and reports them, with the digest of the content of all it holds."""
        entries: dict[str, Any] = {}
        content: dict[str, str] = {}
        for file, tensors in sorted(files.items()):
            on_host = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
            content[file] = content_digest(on_host)
            if owners[file] == self._world.rank:
                entries[file] = astuple(store.write_file(staging, file, encode_tensors(on_host, file)))
        for file, text in sorted(texts.items()):
            content[file] = hashlib.sha256(text.encode()).hexdigest()
            if owners[file] == self._world.rank:
                entries[file] = astuple(store.write_file(staging, file, text.encode()))
        for folder in sorted({file.partition("/")[0] for file in entries}):
            store.sync_folder(staging / folder)
        known = {
            str(particle): health.get(particle, {}) for file in files if (particle := particle_of(file)) is not None
        }
        return {"entries": entries, "content": content, "health": known}

    def _publish(
        self, staging: Path, step: int, written: Sequence[Mapping[str, Any]], metadata: Mapping[str, Any]
    ) -> None:
        manifest = self._manifest(step, written, metadata)
        store.publish(staging, manifest)
        store.prune(self._checkpoints, self._keep, published=step)

    def _manifest(self, step: int, written: Sequence[Mapping[str, Any]], metadata: Mapping[str, Any]) -> Manifest:
        entries = {file: entry for report in written for file, entry in report["entries"].items()}
        content = {file: digest for report in written for file, digest in report["content"].items()}
        health = {int(particle): record for report in written for particle, record in report["health"].items()}
        required = ("config", "config_digest", "prior_identity", "metrics_bytes")
        if missing := [key for key in required if key not in metadata]:
            raise CheckpointError(f"the metadata lacks {', '.join(missing)}; rank 0 has to give {', '.join(required)}")
        manifest = Manifest(
            step=step,
            config_digest=metadata["config_digest"],
            config=metadata["config"],
            world_size=self._world.size,
            versions=_versions(),
            prior_identity=metadata["prior_identity"],
            files={file: FileEntry(*entries[file]) for file in sorted(entries)},
            particles=tuple(
                ParticleEntry(particle, file, health[particle])
                for file in sorted(entries)
                if (particle := particle_of(file)) is not None
            ),
            components={name: content[file] for file in sorted(entries) if (name := component(file))},
            metrics_bytes=metadata["metrics_bytes"],
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            more={key: value for key, value in metadata.items() if key not in required},
        )
        # What no reader would accept must not replace what one would.
        return decode_manifest(manifest.encode(), f"the manifest of step {step}")

    def _examine(self, step: int) -> tuple[reader.Checkpoint | None, list[str]]:
        """One checkpoint, its files hashed by all ranks together, and what is wrong with it: the same on every rank."""
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
            problems = layout or checkpoint.content_problems(share)
            return {"problems": problems, "manifest": hashlib.sha256(checkpoint.manifest.encode()).hexdigest()}

        reports = self._together(f"verifying {folder_name(step)}", work)
        if newer := [report["newer"] for report in reports if "newer" in report]:
            raise NewerFormatError(newer[0])
        problems = list(dict.fromkeys(problem for report in reports for problem in report["problems"]))
        if not problems and len({report["manifest"] for report in reports}) > 1:
            problems = ["ranks read different manifests; the run directory must lie on a file system that all share"]
        return (opened[0] if opened else None), problems


def _owners(action: str, opened: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The rank that writes each file: the lowest that holds it. The same on every rank."""
    holders: dict[str, list[int]] = {}
    for rank, report in enumerate(opened):
        for file in report["files"]:
            holders.setdefault(file, []).append(rank)
    problems: list[str | None] = [None] * len(opened)
    for rank, report in enumerate(opened):
        if report["step"] != opened[0]["step"]:
            problems[rank] = f"is at step {report['step']} and rank 0 at {opened[0]['step']}"
        if shared := [file for file in report["files"] if particle_of(file) is not None and holders[file][0] != rank]:
            problems[rank] = (
                f"holds {shared[0]}, which rank {holders[shared[0]][0]} holds too; a particle has one owner"
            )
    _refuse(action, problems)
    return {file: ranks[0] for file, ranks in holders.items()}


def _refuse_drift(action: str, contents: Sequence[Mapping[str, str]]) -> None:
    """Raises where ranks that hold the same file hold different content."""
    first: dict[str, tuple[int, str]] = {}
    problems: list[str | None] = [None] * len(contents)
    for rank, content in enumerate(contents):
        for file, digest in content.items():
            holder, expected = first.setdefault(file, (rank, digest))
            if digest != expected:
                problems[rank] = f"holds another {file} than rank {holder}: the replicas have drifted apart"
    _refuse(action, problems)


def _refuse(action: str, problems: Sequence[str | None]) -> None:
    """Raises one CheckpointError from the problems of all ranks, in the same words on each."""
    ranks: dict[str, list[str]] = {}
    for rank, problem in enumerate(problems):
        if problem is not None:
            ranks.setdefault(problem, []).append(str(rank))
    if ranks:
        told = "; ".join(f"rank {', '.join(where)}: {problem}" for problem, where in ranks.items())
        raise CheckpointError(f"{action} failed: {told}")


def _describe(error: Exception) -> str:
    match error:
        case CheckpointError():
            return str(error)
        case OSError():
            return f"{error}; check the free space, the quota and the permissions of the run directory"
    return f"{type(error).__name__}: {error}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _RECORDED:
        try:
            found[name] = packages.version(name)
        except packages.PackageNotFoundError:
            continue
    return found
