"""The format of a checkpoint: names, manifest, tensor files. Pure functions; nothing here touches a disk.

A checkpoint is a folder of safetensors and JSON files, described and signed by its `manifest.json`. Particles are keyed
by id, never by rank, so any number of ranks can read what any other number wrote. The full format and its reasons are
in docs/checkpoint-format.md.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor

from distvsd.errors import CheckpointError

FORMAT: Final = 1
MANIFEST: Final = "manifest.json"
# A manifest is read whole before it is checked. At 200 bytes a file this is enough for a million particles.
MAX_MANIFEST_BYTES: Final = 256 * 2**20
# JSON that is nested more deeply could be parsed and would then exceed Python's recursion limit.
MAX_DEPTH: Final = 64
# Every JSON reader is exact up to here, and no count of a run gets there.
MAX_INT: Final = 2**53

_STEP = re.compile(r"step-(\d{8,})", re.ASCII)
_PARTICLE = re.compile(r"particles/(\d{6,12})\.safetensors", re.ASCII)
_SCORE = re.compile(r"score/([a-z][a-z0-9_]{0,63})\.(safetensors|json)", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


class NewerFormatError(CheckpointError):
    """A sound checkpoint that a newer program wrote. It is refused, never skipped in favour of an older one."""


@dataclass(frozen=True)
class FileEntry:
    """SHA-256 (hexadecimal) and size of a file as it lies on disk."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class ParticleEntry:
    """A particle's file, and its health record: any JSON object, empty when nothing is known."""

    id: int
    file: str
    health: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """The description of a checkpoint. Unknown keys of the file are kept in `more`, so that format 1 can gain keys.

    step: rounds completed. config: the whole configuration. world_size: ranks that saved, for information only.
    prior_identity: hash of the frozen prior. components: SHA-256 of tensor content by component, see `content_digest`.
    metrics_bytes: length of metrics.jsonl when this was saved. created: UTC, ISO 8601.
    """

    step: int
    config_digest: str
    config: dict[str, Any]
    world_size: int
    versions: dict[str, str]
    prior_identity: str
    files: dict[str, FileEntry]
    particles: tuple[ParticleEntry, ...]
    components: dict[str, str]
    metrics_bytes: int
    created: str
    more: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def health(self) -> dict[int, dict[str, Any]]:
        """The health records by particle id."""
        return {entry.id: entry.health for entry in self.particles}

    def encode(self) -> bytes:
        """The manifest file, signed and in its only valid spelling. Raises CheckpointError for what is not JSON."""
        content = asdict(self)
        more = content.pop("more")
        if clash := sorted(more.keys() & {*content, "format", "sha256"}):
            raise CheckpointError(f"metadata may not hold the manifest's own keys {clash}; use other names")
        try:
            # Through JSON before sorting: integer keys become strings, which sort differently.
            plain = json.loads(json.dumps({"format": FORMAT, **more, **content}, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"the manifest of step {self.step} is not JSON: {error}; pass plain values"
            ) from error
        return _canonical({**plain, "sha256": _signature(plain)})


def decode_manifest(data: bytes, where: str) -> Manifest:
    """Parses and checks a manifest file; `where` names it in errors.

    Any single flipped bit is found: the file must be, byte for byte, the canonical encoding of its content, and the
    content must match its SHA-256. Anybody can make a valid signature, so names, types and cross-references are checked
    too. Raises CheckpointError; NewerFormatError if a newer program wrote it.
    """
    try:
        content = json.loads(data.decode("ascii"))
        if not isinstance(content, dict):
            raise _damaged(where, "is not a JSON object")
        if _depth(content) > MAX_DEPTH:
            raise _damaged(where, f"is nested more than {MAX_DEPTH} deep")
        signed = content.pop("sha256", None)
        if signed != _signature(content) or _canonical({**content, "sha256": signed}) != data:
            raise _damaged(where, "does not match its own SHA-256")
    except (ValueError, RecursionError) as error:
        raise _damaged(where, f"is not JSON ({str(error)[:80]})") from error
    number = content.pop("format", None)
    if type(number) is int and number > FORMAT:
        raise NewerFormatError(
            f"{where} has format {number}, and this program reads up to {FORMAT}: a newer distvsd wrote it; upgrade "
            f"distvsd to continue this run"
        )
    if type(number) is not int or number != FORMAT:
        raise _damaged(where, f"has no known format ({number!r:.40})")
    return _checked(content, where)


def folder_name(step: int) -> str:
    """The folder of the checkpoint after `step` rounds."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The inverse of `folder_name`; None for every other name."""
    match = _STEP.fullmatch(name)
    step = int(match.group(1)) if match else -1
    return step if step >= 0 and folder_name(step) == name else None


def particle_file(particle: int) -> str:
    """The file of a particle inside a checkpoint."""
    return f"particles/{particle:06d}.safetensors"


def particle_of(file: str) -> int | None:
    """The inverse of `particle_file`; None for files of another kind."""
    match = _PARTICLE.fullmatch(file)
    particle = int(match.group(1)) if match else -1
    return particle if particle >= 0 and particle_file(particle) == file else None


def is_file_name(file: str) -> bool:
    """Whether a checkpoint may hold this file: no other folder, no `..`, no absolute path."""
    return particle_of(file) is not None or _SCORE.fullmatch(file) is not None


def component(file: str) -> str | None:
    """The component whose tensors a file holds ('particle/000003', 'score/adapter'); None for JSON files."""
    if (particle := particle_of(file)) is not None:
        return f"particle/{particle:06d}"
    match = _SCORE.fullmatch(file)
    if match is None or match.group(2) == "json":
        return None
    # peft fixes the name of this file.
    return "score/adapter" if match.group(1) == "adapter_model" else f"score/{match.group(1)}"


def encode_tensors(tensors: Mapping[str, Tensor], file: str) -> bytes:
    """A safetensors file, deterministic. Raises CheckpointError for tensors it cannot hold."""
    import safetensors
    import safetensors.torch

    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach().to("cpu").contiguous()
        storage = value.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory, even where one is a view of another.
        plain[name] = value.clone() if storage in seen else value
        seen.add(storage)
    try:
        # peft and transformers look for this metadata in a file of torch tensors.
        data: bytes = safetensors.torch.save(plain, metadata={"format": "pt"})
    except (safetensors.SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"the tensors of {file} do not fit safetensors: {error}") from error
    return data


def decode_tensors(data: bytes, where: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises CheckpointError if it is not one."""
    import safetensors.torch

    with as_safetensors(where):
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    return tensors


@contextmanager
def as_safetensors(where: str) -> Iterator[None]:
    """Turns errors of a block that reads a safetensors file into CheckpointError; `where` names the file."""
    import safetensors

    try:
        yield
    except (safetensors.SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise _damaged(where, f"is not a safetensors file ({error})") from error


def content_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, sorted by name, independent of the file.

    Each tensor is hashed as one line of JSON, which determines how many bytes follow, and its row-major bytes.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        head = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        digest.update(json.dumps(head).encode() + b"\n")
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def whole_digest(components: Mapping[str, str]) -> str:
    """SHA-256 over the lines `component digest` in the order of the components' names."""
    lines = "".join(f"{name} {components[name]}\n" for name in sorted(components))
    return hashlib.sha256(lines.encode()).hexdigest()


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False).encode("ascii") + b"\n"


def _signature(content: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(content)).hexdigest()


def _damaged(where: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{where} {what}: the file was damaged or changed after it was written; restore it from a copy, or delete this "
        f"checkpoint's folder to continue from the one before it"
    )


def _depth(content: Any) -> int:
    """The nesting depth of objects and lists."""
    depth, level = 0, [content]
    while level:
        depth += 1
        inner = (outer.values() if isinstance(outer, dict) else outer for outer in level)
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
    return depth


def _checked(content: dict[str, Any], where: str) -> Manifest:
    """A manifest from signed content, with the type of every field and every cross-reference checked."""

    def take(key: str, kind: type) -> Any:
        value = content.pop(key, None)
        if type(value) is not kind or (type(value) is int and not 0 <= value <= MAX_INT):
            raise _damaged(where, f"has no valid {key!r}")
        return value

    if "health_bytes" in content:  # early manifests lack it
        content["health_bytes"] = take("health_bytes", int)

    files = {file: _file(file, entry, where) for file, entry in take("files", dict).items()}
    particles = tuple(_particle(entry, where) for entry in take("particles", list))
    components, versions = take("components", dict), take("versions", dict)
    if sorted(entry.file for entry in particles) != sorted(file for file in files if particle_of(file) is not None):
        raise _damaged(where, "lists other particles than files")
    named = [name for file in files if (name := component(file))]
    if sorted(components) != sorted(named):
        raise _damaged(where, "lists other components than files")
    if not all(isinstance(value, str) and _SHA256.fullmatch(value) for value in components.values()):
        raise _damaged(where, "has a component without a SHA-256")
    if not all(isinstance(value, str) for value in versions.values()):
        raise _damaged(where, "has no valid 'versions'")
    return Manifest(
        step=take("step", int),
        config_digest=take("config_digest", str),
        config=take("config", dict),
        world_size=take("world_size", int),
        versions=versions,
        prior_identity=take("prior_identity", str),
        files=files,
        particles=particles,
        components=components,
        metrics_bytes=take("metrics_bytes", int),
        created=take("created", str),
        more=content,
    )


def _file(file: str, entry: Any, where: str) -> FileEntry:
    if not is_file_name(file):
        raise CheckpointError(
            f"{where} names the file {file!r:.120}, which no checkpoint holds: the manifest was not written by this "
            f"program; do not use this checkpoint"
        )
    match entry:
        case {"sha256": str(sha256), "bytes": int(size), **rest} if (
            not rest and type(size) is int and 0 <= size <= MAX_INT
        ):
            if _SHA256.fullmatch(sha256):
                return FileEntry(sha256, size)
    raise _damaged(where, f"has no valid entry for {file}")


def _particle(entry: Any, where: str) -> ParticleEntry:
    match entry:
        case {"id": int(particle), "file": str(file), "health": dict(health), **rest} if not rest:
            if particle_of(file) == particle and type(particle) is int:
                return ParticleEntry(particle, file, health)
    raise _damaged(where, f"has no valid entry for a particle ({entry!r:.80})")
