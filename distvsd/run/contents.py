"""What the files of a checkpoint must hold so that a run can continue: checked by a resume and by `distvsd verify`.

The packages that read a file define what must be in it (`particles.stored`, `score.stored`, `score.replay`). This
module combines those rules for one configuration. A resume has its own network and prior. `distvsd verify` takes the
configuration from the manifest, and shapes from the file headers of the prior that the run's config.yaml names.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from distvsd.checkpoint.format import Manifest, particle_of, whole_digest
from distvsd.checkpoint.reader import Checkpoint, steps
from distvsd.checkpoint.verify import verify_run
from distvsd.config import Config, config_from, load_config
from distvsd.errors import CheckpointError, ConfigError, PriorError
from distvsd.networks.folder import PipelineFolder, open_folder
from distvsd.networks.identity import Identity
from distvsd.particles.base import Particle
from distvsd.particles.health import Health
from distvsd.particles.stored import blank_state, read_particle
from distvsd.prior.prompts import VIEWS
from distvsd.run.parts import blank_particle
from distvsd.runtime.paths import RunPaths
from distvsd.score import stored
from distvsd.score.replay import Limits
from distvsd.stages import stage_folders
from distvsd.vsd.wanted import MOST

_log = logging.getLogger("distvsd")


@dataclass(frozen=True)
class Contents:
    """See `checkpoint.reader.Contents`. config: the reader's. trainable: shapes of the score network's trained tensors.

    particle: the run's kind; None: made from the configuration. prior: None where it is missing; then latents may have
    any shape. kept: most rounds allowed in the replay buffer; a resume takes any number and keeps the newest.
    """

    config: Config
    trainable: stored.Shapes
    prior: PipelineFolder | None
    kept: int = MOST
    particle: Particle | None = None

    def refuse_manifest(self, manifest: Manifest) -> None:
        """Raises CheckpointError for other particles, missing files, and impossible records of health."""
        refuse_other_particles(manifest, self.config.particles.count)
        if missing := sorted(set(stored.files_of(self.trainable)) - manifest.files.keys()):
            raise CheckpointError(
                f"it holds no {', '.join(missing)}, which this run reads; resume with the configuration that it was "
                "saved with, or delete this checkpoint to go on from an older one"
            )
        for record in manifest.health.values():
            Health.from_json(record, manifest.step)

    def refuse_file(self, manifest: Manifest, file: str, tensors: Mapping[str, Tensor]) -> None:
        """Raises CheckpointError where a resume could not read the file."""
        particle_id = particle_of(file)
        if particle_id is not None:
            like = self._particle(tensors)
            read_particle(particle_id, like, tensors, manifest.health[particle_id], manifest.step)
        elif file == stored.REPLAY_FILE:
            channels = self.prior.latent_channels if self.prior else None
            limits = Limits(self.kept, manifest.step, self.config.particles.count, len(VIEWS), channels)
            limits.refuse_unfit(tensors)
        elif file in stored.files_of(self.trainable):
            stored.refuse_unfit(file, self.trainable, tensors)

    def _particle(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The state of one particle, without values. tensors: of which latents take their shape where no prior says."""
        if self.particle is not None or self.prior is not None or not self.config.are_latents:
            return self._known_particle
        image = tensors.get("param/image")
        channels, height, width = image.shape if image is not None and image.ndim == 3 and image.numel() else (1, 1, 1)
        return blank_state(blank_particle(self.config, (channels, height, width)))

    @cached_property
    def _known_particle(self) -> Mapping[str, Tensor]:
        if self.particle is not None:
            return blank_state(self.particle)
        latents = self.prior.latent_shape(self.config.final_resolution) if self.prior else None
        return blank_state(blank_particle(self.config, latents))


def refuse_other_particles(manifest: Manifest, count: int) -> None:
    """Raises CheckpointError unless the manifest's particles are 0 to count - 1."""
    ids = manifest.health.keys()
    if len(ids) != count:
        raise CheckpointError(
            f"it holds {len(ids)} particles, but particles.count is {count}; resume with that count, or choose another "
            "run.dir"
        )
    if strange := sorted(particle for particle in ids if particle >= count):
        raise CheckpointError(
            f"it holds a particle {strange[0]}, but the {count} of this run are 0 to {count - 1}; the checkpoint was "
            "altered: delete it to go on from an older one"
        )


def verify(run: Path, digest: bool = False) -> list[str]:
    """Runs `checkpoint.verify.verify_run`. A checkpoint is sound if a resume with its own configuration can read it.

    In a run with stages, verifies all that have a checkpoint: their lines begin with the stage, `2-fine/`, and the last
    line of the digest covers all stages. Without the prior, the checks that need it are skipped with a warning.
    """
    stages = [folder for folder in stage_folders(run) if steps(RunPaths(folder).checkpoints)]
    if not stages:
        return verify_run(run, digest, _Judge(run).problems)
    lines, problems = [], []
    for folder in stages:
        try:
            found = verify_run(folder, digest, _Judge(folder).problems)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            lines += [f"{folder.name}/{line}" for line in found]
    if problems:
        raise CheckpointError("; ".join(problems))
    whole = {name: value for name, _, value in (line.partition(" ") for line in lines)}
    return lines + [f"all {whole_digest(whole)}"] * digest


class _Judge:
    """Finds what is wrong with the checkpoints of a run, each judged by the configuration in its manifest."""

    def __init__(self, run: Path) -> None:
        self._prior: PipelineFolder | None = None
        try:
            # The path is the run's, not a manifest's: a checkpoint must not be able to have other files opened.
            config = load_config(RunPaths(run).config)
            prior = open_folder(config.prior.path)
            base = open_folder(config.score.base) if config.score.base else prior
            self._unet = {name: header.shape for name, header in base.weights["unet"].headers.items()}
            stored.trainable_of(self._unet, 1, reads_cameras=True)
        except (ConfigError, PriorError) as error:
            self._why = str(error)
        else:
            self._prior = prior

    def problems(self, checkpoint: Checkpoint) -> list[str]:
        """Empty for a sound one."""
        manifest = checkpoint.manifest
        try:
            config = config_from(manifest.config, f"{checkpoint.folder}/manifest.json")
        except ConfigError as error:
            return [*checkpoint.problems(), f"{error}; no run can have it: delete this checkpoint"]
        if custom := manifest.more.get("custom"):
            _log.warning(
                "%s was trained with parts of the caller's own (%s): their tensors could not be held against a "
                "configuration, everything else was",
                checkpoint.folder,
                ", ".join(custom) if isinstance(custom, dict) else custom,
            )
            return checkpoint.problems()
        if self._prior is not None:
            problems = checkpoint.problems(self._contents(config, self._unet, self._prior))
            if not problems or Identity(self._prior).fits(manifest.prior_identity):
                return problems
            self._why = f"{self._prior.path} holds another prior than the one it was trained against"
        try:
            unet = _unet_of(checkpoint) if config.objective.needs_score else {}
        except CheckpointError as error:
            return list(dict.fromkeys([*checkpoint.problems(), str(error)]))
        _log.warning(
            "%s: the shapes of adapter and latents could not be held against the prior, everything else was: %s",
            checkpoint.folder,
            self._why,
        )
        return checkpoint.problems(self._contents(config, unet, None))

    def _contents(self, config: Config, unet: stored.Shapes, prior: PipelineFolder | None) -> Contents:
        trainable: stored.Shapes = {}
        if config.objective.needs_score:
            trainable = stored.trainable_of(unet, config.score.rank, config.reads_cameras)
        return Contents(config, trainable, prior, config.score.replay_rounds)


def _unet_of(checkpoint: Checkpoint) -> stored.Shapes:
    """Shapes of the UNet, derived from the checkpoint's own adapter because the prior is missing."""
    has_camera = stored.CAMERA_FILE in checkpoint.manifest.files
    camera = checkpoint.read(stored.CAMERA_FILE) if has_camera else {}
    return stored.unet_like(checkpoint.read(stored.ADAPTER_FILE), camera)
