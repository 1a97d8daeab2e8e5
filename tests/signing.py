"""Checkpoints that a stranger changed and signed anew, and a resume from them, for tests of what is read."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from distvsd.checkpoint.format import component, content_digest
from distvsd.config import Config
from distvsd.errors import CheckpointError
from distvsd.parallel.world import World
from distvsd.run import trainer
from distvsd.run.build import Run
from distvsd.runtime.heartbeat import Heartbeat
from distvsd.runtime.preempt import Preemption
from distvsd.stages import Stage

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def signed(manifest: dict[str, Any]) -> bytes:
    """As docs/checkpoint-format.md spells and signs a manifest."""

    def spelt(content: dict[str, Any]) -> bytes:
        return json.dumps(content, sort_keys=True, indent=1).encode("ascii") + b"\n"

    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return spelt(content | {"sha256": hashlib.sha256(spelt(content)).hexdigest()})


def enter(manifest: dict[str, Any], checkpoint: Path, file: str, data: bytes) -> None:
    """Writes a file, and says so in the manifest, as far as that is one."""
    (checkpoint / file).write_bytes(data)
    if isinstance(manifest.get("files"), dict):
        manifest["files"][file] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    if isinstance(manifest.get("components"), dict) and (name := component(file)):
        try:
            manifest["components"][name] = content_digest(load_file(checkpoint / file))
        except (SafetensorError, ValueError):
            manifest["components"][name] = "0" * 64


def change_tensors(
    manifest: dict[str, Any], checkpoint: Path, file: str, change: Callable[[dict[str, Tensor]], object]
) -> None:
    """Writes a file anew with its tensors changed."""
    tensors = load_file(checkpoint / file)
    change(tensors)
    enter(manifest, checkpoint, file, save({name: value.contiguous() for name, value in tensors.items()}))


def trainer_of(config: Config, run: Path) -> trainer.Trainer:
    """Has resumed the run when it is made."""
    stage = Stage(replace(config, run=replace(config.run, dir=str(run))), 1)
    return trainer.Trainer(stage, ALONE, Preemption(), Heartbeat(stage.paths.heartbeats, 0, 1))


def resume(config: Config, parts: Run, run: Path) -> None:
    """All that a trainer does before its first round, into parts that are there already, which takes no time.

    Raises AssertionError where a resume that is refused has changed a part or a file.
    """
    before = _state(parts), _files(run)
    try:
        with _given(parts):
            trainer_of(config, run).journal.close("failed")
    except CheckpointError:
        assert (_state(parts), _files(run)) == before, "a resume that was refused changed something"
        raise


@contextmanager
def _given(parts: Run) -> Iterator[None]:
    """Trainers get these parts; they collect no garbage, and say nothing of the checkpoints that they pass over."""
    with (
        mock.patch.object(trainer, "build_run", lambda *_, **__: parts),
        mock.patch.object(trainer, "tame_garbage_collector", lambda: None),
        mock.patch.object(logging.getLogger("distvsd"), "disabled", True),
    ):
        yield


def _state(parts: Run) -> list[Any]:
    states = [*parts.ensemble.state().values(), *(parts.training.state().values() if parts.training else ())]
    return [parts.ensemble.health(), [content_digest(state) for state in states]]


def _files(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
