"""The particles of a run on disk, for looking at them: what evaluating and rendering open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distvsd.build import make_ensemble
from distvsd.cameras import Cameras
from distvsd.checkpoint import reader
from distvsd.config import Config, load_config
from distvsd.contents import refuse_other_particles
from distvsd.errors import CheckpointError, RunError
from distvsd.particles import Ensemble
from distvsd.prior.load import load_prior
from distvsd.runtime.paths import RunPaths


@dataclass(frozen=True)
class Restored:
    """The particles of a run as its newest sound checkpoint holds them, on one device; needs no launcher."""

    config: Config
    ids: list[int]
    step: int
    ensemble: Ensemble
    decode: Callable[[Tensor], Tensor] | None
    health: dict[int, dict[str, Any]] = field(default_factory=dict)

    @torch.no_grad()
    def render(self, ids: list[int], cameras: Cameras, resolution: int, background: float) -> tuple[Tensor, Tensor]:
        """Images `[P, V, 3, H, W]` and opacity `[P, V, 1, H, W]` of particles `ids` from cameras `[P, V]`.

        Nothing random. background: grey level in [0, 1]. Image particles ignore cameras and are opaque; latents are
        decoded. Images of a diverged particle are not finite.
        """
        device = next(iter(self.ensemble.parameters_of(ids[0]).values())).device
        rendered = self.ensemble.view(ids, cameras.to(device), resolution, background)
        images, opacity = rendered.images, rendered.opacity
        if self.decode is not None:
            images = self.decode(images.flatten(0, 1)).reshape(*images.shape[:2], 3, resolution, resolution)
            opacity = torch.ones_like(images[:, :, :1])
        return images, opacity


def load_particles(run_dir: Path, device: str | None = None, most: int | None = None) -> Restored:
    """Opens a finished, stopped or running run for looking. Reads only; takes no lock.

    device: None for a GPU where there is one. most: so many particles, the first ones, are loaded; None for all.
    `health` is of all in any case.
    Raises RunError where the folder is no run, CheckpointError where it has no sound checkpoint yet.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    paths = RunPaths(Path(run_dir))
    if not paths.config.is_file():
        raise RunError(f"{run_dir} is not a run: it has no config.yaml; give the run.dir of a training")
    config = load_config(paths.config)
    checkpoint = reader.newest(paths.checkpoints)
    if checkpoint is None:
        raise CheckpointError(f"{run_dir} has no checkpoint yet; train at least to the first one (checkpoint.every)")
    refuse_other_particles(checkpoint.manifest, config.particles.count)
    is_latent = config.particles.kind == "image" and config.particles.image.space == "latent"
    prior = load_prior(config.prior.path, [""], device=device) if is_latent else None
    entries = checkpoint.manifest.particles[:most]
    ids = [entry.id for entry in entries]
    ensemble = make_ensemble(config, prior, ids, device)
    for entry in entries:
        ensemble.load_state(entry.id, checkpoint.read(entry.file), entry.health)
    decode = prior.decode if prior else None
    return Restored(config, ids, checkpoint.manifest.step, ensemble, decode, checkpoint.manifest.health)
