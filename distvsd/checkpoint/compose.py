"""Makes the manifest of a checkpoint from the reports of all ranks."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from importlib import metadata as packages
from typing import Any, Final

from distvsd.checkpoint.format import FileEntry, Manifest, ParticleEntry, component, decode_manifest, particle_of
from distvsd.errors import CheckpointError

_RECORDED: Final = ("distvsd", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")
_REQUIRED: Final = ("config", "config_digest", "prior_identity", "metrics_bytes")


def frozen_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy. Raises CheckpointError if a key is missing or something is not JSON."""
    if missing := [key for key in _REQUIRED if key not in metadata]:
        raise CheckpointError(f"the metadata lacks {', '.join(missing)}; rank 0 must give {', '.join(_REQUIRED)}")
    frozen: dict[str, Any] = plain(metadata, "the metadata")
    return frozen


def plain(value: Any, what: str) -> Any:
    """The value after a round trip through JSON. Raises CheckpointError for what is not JSON."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{what} is not JSON: {error}; pass plain values") from error


def compose(step: int, world_size: int, written: Sequence[Mapping[str, Any]], metadata: Mapping[str, Any]) -> Manifest:
    """The manifest of what all ranks wrote. written: by rank, its file entries, content digests and health records."""
    entries = {file: entry for report in written for file, entry in report["entries"].items()}
    content = {file: digest for report in written for file, digest in report["content"].items()}
    health = {int(particle): record for report in written for particle, record in report["health"].items()}
    manifest = Manifest(
        step=step,
        config_digest=metadata["config_digest"],
        config=metadata["config"],
        world_size=world_size,
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
        more={key: value for key, value in metadata.items() if key not in _REQUIRED},
    )
    # A manifest that readers would refuse must not replace one that they accept.
    return decode_manifest(manifest.encode(), f"the manifest of step {step}")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _RECORDED:
        try:
            found[name] = packages.version(name)
        except packages.PackageNotFoundError:
            continue
    return found
