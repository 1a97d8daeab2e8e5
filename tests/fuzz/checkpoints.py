"""Checkpoints of finished runs with random changes and a valid signature: a resume reads all that `distvsd verify`
accepts.

A case is a copy of a run directory. The parts of each run are built once per process, and the real trainer restores
every case into them. A refused resume must leave the state and the files unchanged.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from distvsd.checkpoint.format import component
from distvsd.config import Config, to_yaml
from distvsd.errors import CheckpointError
from distvsd.faults import injected
from distvsd.run.build import Run
from distvsd.run.contents import verify
from distvsd.testing.pipelines import tiny_pipeline
from tests.signing import change_tensors, enter, resume, signed, trainer_of
from tests.small_run import small_config

STEP = 3
# The runs cover all three kinds of good states, failed, restored and quarantined particles, and SDS.
SETTINGS: dict[str, dict[str, Any]] = {
    "nerf": {
        "render.resolution": "{0: 16, 2: 24}",
        "particles.health.max_bad": 1,
        "particles.health.max_restores": 1,
        "score.replay_share": 0.25,
    },
    "pixels": {"particles.kind": "image", "objective.kind": "sds"},
    "latents": {"particles.kind": "image", "particles.image.space": "latent", "particles.image.init_color": 0.3},
}
FAULTS = "nan@gradient:particle=1; nan@latent:particle=0:step=2"


@dataclass(frozen=True)
class Finished:
    """A finished run and its parts, into which a resume restores."""

    config: Config
    parts: Run


def _finished(folder: Path, prior: Path, changes: dict[str, Any]) -> Finished:
    config = small_config(
        folder, prior, **{"schedule.rounds": STEP, "score.rank": 2, "particles.health.good_every": 2, **changes}
    )
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    with injected(FAULTS):
        trained = trainer_of(config, folder)
        trained.run()
    return Finished(config, trained.parts)


def _all_finished() -> list[Finished]:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-runs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    prior = tiny_pipeline(folder / "prior", "shapes", "v_prediction", 0)
    return [_finished(folder / name, prior, changes) for name, changes in SETTINGS.items()]


RUNS = _all_finished()  # at import, because training takes longer than the time limit of a case


def attempt(draw: random.Random, folder: Path) -> None:
    """Verifies and resumes a changed run. Raises AssertionError if the two do not agree."""
    finished = draw.choice(RUNS)
    run = folder / "run"
    shutil.copytree(finished.config.run.dir, run)
    checkpoint = run / "checkpoints" / f"step-{STEP:08d}"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    identity = manifest["prior_identity"]
    for _ in range(draw.choice((0, 1, 1, 1, 2))):
        draw.choice(CHANGES)(draw, manifest, checkpoint)
    (checkpoint / "manifest.json").write_bytes(signed(manifest))
    refused: CheckpointError | None = None
    try:
        verify(run)
    except CheckpointError as error:
        refused = error
    try:
        resume(finished.config, finished.parts, run)
    except CheckpointError as error:
        # A checkpoint does not contain the prior. A resume compares the prior's identity, and `verify` does not.
        if refused is None and manifest.get("prior_identity") == identity:
            raise AssertionError(f"verify accepts what a resume refuses: {error}") from error
    if refused is not None:
        raise refused


def _change_a_value(draw: random.Random, manifest: dict[str, Any], checkpoint: Path) -> None:
    """Changes a value of the manifest at any depth, often in the parts that only a resume reads."""
    holder, key = manifest, draw.choice(["health_bytes", "metrics_bytes", *manifest])
    if draw.random() < 0.4 and isinstance(manifest.get("particles"), list) and manifest["particles"]:
        record = draw.choice(manifest["particles"])
        if isinstance(record, dict) and isinstance(record.get("health"), dict):
            holder, key = record["health"], draw.choice([*record["health"], "unknown"])
    while isinstance(holder.get(key), dict) and holder[key] and draw.random() < 0.8:
        holder = holder[key]
        key = draw.choice(list(holder))
    if draw.random() < 0.15:
        holder.pop(key, None)
        return
    holder[key] = draw.choice(VALUES)(draw, holder.get(key))


def _nested(draw: random.Random, old: Any) -> Any:
    value: Any = old
    for _ in range(draw.choice((3, 60, 70, 300))):
        value = [value] if draw.random() < 0.5 else {"a": value}
    return value


VALUES: list[Callable[[random.Random, Any], Any]] = [
    lambda draw, old: draw.choice([None, True, False, "", "7", [], {}, [1], {"a": 1}, "beside", "present", "initial"]),
    lambda draw, old: draw.choice([0, 1, -1, STEP, STEP + 1, 2**31, 2**53, 2**63, 10**30, -(10**400)]),
    lambda draw, old: draw.choice([0.0, -0.5, 1.5, 1e308, 1e-320, float("inf"), float("nan")]),
    lambda draw, old: old + draw.choice((-1, 1, 7)) if isinstance(old, int) else f"{old}"[:60],
    lambda draw, old: f"{old}"[:60],
    lambda draw, old: [old],
    _nested,
]


def _change_a_tensor(draw: random.Random, manifest: dict[str, Any], checkpoint: Path) -> None:
    file = draw.choice(sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*.safetensors")))

    def change(tensors: dict[str, Tensor]) -> None:
        for _ in range(draw.choice((1, 1, 3))):
            names = sorted(tensors)
            # There are few scalars and counts among many other tensors, so they are chosen more often.
            few = [name for name in names if tensors[name].dtype == torch.int64 or tensors[name].ndim == 0]
            name = draw.choice(few if few and draw.random() < 0.4 else names) if names else "none"
            draw.choice(TENSORS)(draw, tensors, name)

    with contextlib.suppress(SafetensorError, ValueError):  # an earlier change of this case damaged the file
        change_tensors(manifest, checkpoint, file, change)


def _put(make: Callable[[random.Random, Tensor], Tensor]) -> Callable[[random.Random, dict[str, Tensor], str], None]:
    def change(draw: random.Random, tensors: dict[str, Tensor], name: str) -> None:
        if name in tensors:
            tensors[name] = make(draw, tensors[name].clone())

    return change


def _element(draw: random.Random, value: Tensor) -> Tensor:
    numbers = (0, -1, 1, 3, 2**24, 2**53, 2**63 - 1, -(2**63)) if value.dtype == torch.int64 else (0.0, -1.0, 1e30)
    if value.is_floating_point():
        numbers = (*numbers, float("nan"), float("inf"), -float("inf"), -1e-30)
    if value.numel() and value.dtype != torch.bool:
        value.view(-1)[draw.randrange(value.numel())] = draw.choice(numbers)
    return value


def _shaped(draw: random.Random, value: Tensor) -> Tensor:
    shapes = [value.flatten(), value[None], value.reshape(-1)[:0], value.reshape(-1)[:1], value.reshape(-1)[:-1]]
    if value.ndim:
        shapes += [value[:-1], torch.cat([value, value]), value.transpose(0, -1), value[..., None], value[:0]]
    if value.numel() == 1:
        shapes.append(value.reshape(()))
    return draw.choice(shapes)


def _remove(draw: random.Random, tensors: dict[str, Tensor], name: str) -> None:
    tensors.pop(name, None)


def _rename(draw: random.Random, tensors: dict[str, Tensor], name: str) -> None:
    if name in tensors:
        new = draw.choice([name + "x", "good/" + name, name.upper(), "", draw.choice(sorted(tensors))])
        tensors[new] = tensors.pop(name)


def _add(draw: random.Random, tensors: dict[str, Tensor], name: str) -> None:
    tensors[draw.choice(["occupancy", "good/param/image", "left_out", "num_steps", "adam_step"])] = torch.zeros(2)


DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
TENSORS: list[Callable[[random.Random, dict[str, Tensor], str], None]] = [
    _put(_element),
    _put(_element),
    _put(_element),
    _put(_shaped),
    _put(lambda draw, value: value.to(draw.choice(DTYPES))),
    _put(lambda draw, value: value.neg() if value.dtype != torch.bool else value),
    _put(lambda draw, value: value.clone()),
    _remove,
    _rename,
    _add,
]


def _change_a_file(draw: random.Random, manifest: dict[str, Any], checkpoint: Path) -> None:
    """Changes a file's bytes, removes or adds a file, or replaces a file by a copy of another."""
    file = draw.choice(sorted(str(path.relative_to(checkpoint)) for path in checkpoint.glob("*/*")))
    data = bytearray((checkpoint / file).read_bytes())
    match draw.randrange(6):
        case 0:
            if data:
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        case 1:
            data = data[: draw.randrange(len(data) + 1)]
        case 2:
            data = bytearray(draw.choice([b"", b"{}", b"\x80\x04K\x01.", b"\xff" * 64, b"\0" * 8 + b"{}"]))
        case 3:
            file = draw.choice(["particles/000003.safetensors", "score/extra.safetensors", "score/extra.json"])
            if file.startswith("particles/") and isinstance(manifest.get("particles"), list):
                manifest["particles"].append({"id": 3, "file": file, "health": {}})
        case 4:
            (checkpoint / file).unlink()
            for part in ("files", "components"):
                if isinstance(manifest.get(part), dict):
                    manifest[part].pop(file if part == "files" else component(file), None)
            return
        case 5:
            other = draw.choice(sorted(checkpoint.glob("*/*")))
            data = bytearray(other.read_bytes())
    enter(manifest, checkpoint, file, bytes(data))


CHANGES = [_change_a_value, _change_a_value, _change_a_tensor, _change_a_tensor, _change_a_tensor, _change_a_file]
