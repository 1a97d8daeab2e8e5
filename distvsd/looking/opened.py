"""Opens the particles of a run on disk, to evaluate or render them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distvsd.cameras import Cameras, CameraSampler
from distvsd.checkpoint import reader
from distvsd.config import Config, load_config, to_dict
from distvsd.config.canonical import BOOKKEEPING
from distvsd.errors import CheckpointError
from distvsd.particles import Ensemble, Particle
from distvsd.prior.load import load_prior
from distvsd.run.contents import refuse_other_particles
from distvsd.run.custom import Custom
from distvsd.run.parts import make_ensemble
from distvsd.runtime import inside
from distvsd.runtime.paths import RunPaths

_log = logging.getLogger("distvsd")


@dataclass(frozen=True)
class Opened:
    """The particles of a run as its newest sound checkpoint holds them, on one device; needs no launcher.

    ids: those that are loaded. step: rounds completed. decode: latents to images, None where particles are no latents.
    health: of all particles, also of those that are not loaded.
    """

    config: Config
    ids: list[int]
    step: int
    ensemble: Ensemble
    decode: Callable[[Tensor], Tensor] | None
    health: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def particle(self) -> Particle:
        return self.ensemble.particle

    @property
    def sampler(self) -> CameraSampler:
        return self.ensemble.sampler

    @torch.no_grad()
    def render(self, ids: list[int], cameras: Cameras, resolution: int, background: float) -> tuple[Tensor, Tensor]:
        """Images `[P, V, 3, H, W]` and opacity `[P, V, 1, H, W]` of particles `ids` from cameras `[P, V]`.

        Nothing random. background: grey level in [0, 1]. Latents are decoded, and are opaque. Images of a diverged
        particle are not finite.
        """
        rendered = self.ensemble.view(ids, cameras, resolution, background)
        images, opacity = rendered.images, rendered.opacity
        if self.decode is not None:
            images = self.decode(images.flatten(0, 1)).reshape(*images.shape[:2], 3, resolution, resolution)
            opacity = torch.ones_like(images[:, :, :1])
        return images, opacity


@dataclass(frozen=True)
class Saved:
    """A run's newest sound checkpoint and its configuration, of which nothing is loaded yet."""

    config: Config
    checkpoint: reader.Checkpoint
    config_file: Path
    device: str
    custom: Custom

    @property
    def ids(self) -> list[int]:
        """Of all particles."""
        return [entry.id for entry in self.checkpoint.manifest.particles]

    def load(self, ids: Sequence[int]) -> Opened:
        """Some of the particles. Raises CheckpointError where one cannot be read."""
        config, manifest = self.config, self.checkpoint.manifest
        prior = load_prior(config.prior.path, [""], device=self.device) if self._are_latents else None
        entries = {entry.id: entry for entry in manifest.particles}
        ensemble = make_ensemble(config, prior, list(ids), self.device, blank=True, custom=self.custom)
        for entry in (entries[particle_id] for particle_id in ids):
            state = self.checkpoint.read(entry.file)
            try:
                ensemble.load_state(entry.id, state, entry.health)
            except CheckpointError as error:
                raise CheckpointError(f"{self.config_file} does not fit {self.checkpoint.folder}: {error}") from error
        decode = prior.decode if prior else None
        return Opened(config, list(ids), manifest.step, ensemble, decode, manifest.health)

    @property
    def _are_latents(self) -> bool:
        return self.custom.particle.is_latent if self.custom.particle is not None else self.config.are_latents


def open_run(run_dir: Path, device: str | None = None, custom: Custom = Custom()) -> Saved:
    """Opens a finished, stopped or running run for looking. Reads only; takes no lock.

    device: None for a GPU if there is one. custom: the parts that it was trained with. Raises RunError where the folder
    is no run, CheckpointError where it has no sound checkpoint yet, ConfigError where its config.yaml is no valid
    configuration.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    paths = RunPaths(Path(run_dir))
    config = load_config(paths.known_config())
    inside.expect_folder(paths.root, paths.checkpoints.name)
    checkpoint = reader.newest(paths.checkpoints)
    if checkpoint is None:
        raise CheckpointError(f"{run_dir} has no checkpoint yet; train at least to the first one (checkpoint.every)")
    compare_with_saved(paths, config, checkpoint)
    return Saved(config, checkpoint, paths.config, device, custom)


def load_particles(
    run_dir: Path, device: str | None = None, most: int | None = None, custom: Custom = Custom()
) -> Opened:
    """The particles of a run, all at once. most: loads only so many, the first ones; None for all. Raises what
    `open_run` raises."""
    saved = open_run(run_dir, device, custom)
    return saved.load(saved.ids[:most])


def compare_with_saved(paths: RunPaths, config: Config, checkpoint: reader.Checkpoint) -> None:
    """Compares a run's config.yaml with the configuration that its checkpoint was saved with.

    Other values only give a warning, because a run that was just resumed with changed values has them too. Another
    number of particles raises CheckpointError.
    """
    manifest = checkpoint.manifest
    try:
        refuse_other_particles(manifest, config.particles.count)
    except CheckpointError as error:
        raise CheckpointError(f"{paths.config} is not the configuration of {checkpoint.folder}: {error}") from error
    changed = [key for key in _changed(manifest.config, to_dict(config), "") if not key.startswith(BOOKKEEPING)]
    if changed:
        _log.warning(
            "%s is not the configuration that %s was saved with (other values of %s); if the run was not resumed with "
            "changed ones, it is another run's: restore it",
            paths.config,
            checkpoint.folder,
            ", ".join(changed[:8]),
        )


def _changed(saved: Any, now: Any, key: str) -> list[str]:
    """Dotted keys whose values differ, of those that both have: another version may know more fields."""
    # The keys of a schedule are rounds, or the word "linear".
    is_section = isinstance(now, dict) and all(isinstance(name, str) and name != "linear" for name in now)
    if is_section and isinstance(saved, dict):
        both = [name for name in now if name in saved]
        return [text for name in both for text in _changed(saved[name], now[name], f"{key}.{name}".lstrip("."))]
    return [] if json.loads(json.dumps(now)) == saved else [key]
