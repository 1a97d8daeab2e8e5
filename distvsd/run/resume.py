"""How a stage begins: from its own newest checkpoint, from the particles of the stage before, or anew."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import torch

from distvsd.checkpoint.format import particle_file
from distvsd.checkpoint.reader import Checkpoint, steps
from distvsd.checkpoint.saver import Saver
from distvsd.config import Config
from distvsd.errors import CheckpointError, ConfigError
from distvsd.networks.folder import open_folder
from distvsd.parallel.collectives import agreed
from distvsd.parallel.world import World
from distvsd.particles.base import Handed, HandedRows, Particle
from distvsd.particles.good import most_copies
from distvsd.run.build import Run
from distvsd.run.contents import Contents, refuse_other_particles
from distvsd.run.custom import Custom
from distvsd.run.parts import Latents, blank_particle, make_particle
from distvsd.score.stored import CAMERA_FILE
from distvsd.score.training import kept_rows
from distvsd.stages import HandOver, Stage, stage_before, stages_of

_log = logging.getLogger("distvsd")

Source = Callable[[Latents, Sequence[int]], HandedRows]


def refuse_impossible_hand_overs(config: Config, custom: Custom) -> None:
    """Raises ConfigError where a stage cannot begin with the particles of the stage before. Called before any stage is
    trained. Makes no particle; opens the prior's folder where particles are its latents. A custom particle is the same
    in all stages."""
    if custom.particle is not None:
        return
    nobody = torch.zeros(0, dtype=torch.int64)
    for stage in stages_of(config):
        before = stage_before(stage)
        if before is None:
            continue
        given, taker = (_blank(each.config) for each in (before, stage))
        try:
            taker.init(config.run.seed, nobody, Handed(given, given.init(config.run.seed, nobody)))
        except ConfigError as error:
            raise ConfigError(f"{stage.folder or 'the run'} cannot begin from {before.paths.root}: {error}") from error


def _blank(config: Config) -> Particle:
    if not config.are_latents:
        return blank_particle(config, None)
    return blank_particle(config, open_folder(config.prior.path).latent_shape(config.final_resolution))


def source_of(stage: Stage, world: World, custom: Custom) -> Source | None:
    """Returns the function that gives this rank's particles as the stage before left them; None where they begin anew.
    Collective: all ranks read and verify the checkpoint together. Raises CheckpointError where there is none, and where
    the newest is damaged: to begin from an older one would be another run."""
    before = agreed(world, lambda: stage_before(stage))
    if before is None:
        return None
    step = agreed(world, lambda: next(iter(steps(before.paths.checkpoints)), None))
    checkpoint = Saver(before.paths.checkpoints, world).load(step)
    if checkpoint is None:
        raise CheckpointError(
            f"{before.paths.checkpoints} holds no checkpoint, which {stage.folder or 'the run'} begins from; "
            f"restore it, or delete {stage.paths.root} and what comes after it to train from there on again"
        )
    refuse_other_particles(checkpoint.manifest, stage.config.particles.count)

    def source(prior: Latents, ids: Sequence[int]) -> HandedRows:
        particle = custom.particle or make_particle(before.config, prior, world.device)
        return HandOver(checkpoint, particle, ids)

    return source


def resume(parts: Run, saver: Saver) -> tuple[int, int, int | None]:
    """Restores the newest sound checkpoint into the parts; collective.

    Returns what the checkpoint records: rounds completed, and the lengths of metrics.jsonl and health.jsonl in bytes.
    Zeros where there is none.
    """
    trainable = parts.training.score.trainable if parts.training else {}
    shapes = {name: parameter.shape for name, parameter in trainable.items()}
    checkpoint = saver.load(
        contents=Contents(parts.config, shapes, parts.prior.folder, particle=parts.ensemble.particle)
    )
    if checkpoint is None:
        return 0, 0, 0
    agreed(parts.world, lambda: _restore(parts, checkpoint))
    parts.sizes.load_state(checkpoint.manifest.more.get("sizes", {}))
    manifest = checkpoint.manifest
    return manifest.step, manifest.metrics_bytes, manifest.more.get("health_bytes")


def _restore(parts: Run, checkpoint: Checkpoint) -> None:
    manifest, config = checkpoint.manifest, parts.config
    if not parts.prior.is_identified_by(manifest.prior_identity):
        raise CheckpointError(
            f"{checkpoint.folder} was trained against another prior than {config.prior.path} holds now; resume with "
            "that prior, or choose another run.dir"
        )
    saved, now = manifest.more.get("custom", {}), parts.custom.names()
    if saved != now:
        raise CheckpointError(
            f"{checkpoint.folder} was trained with the custom parts {_listed(saved)}, and this run has {_listed(now)}; "
            "resume with the same parts (distvsd.train(config, custom=...)), or choose another run.dir"
        )
    base, trained_on = parts.identities().get("score_base", ("", None)), manifest.more.get("score_base_identity")
    if parts.training is not None and base[1] != trained_on:
        raise CheckpointError(
            f"the score network in {checkpoint.folder} was trained on another base than score.base "
            f"{base[0] or 'empty'} gives now; resume with that base, or choose another run.dir"
        )
    if parts.world.rank == 0 and CAMERA_FILE in manifest.files and not config.reads_cameras:
        _log.warning(
            "%s holds a camera network, which runs without cameras no longer have; it is left out, and the adapter "
            "learns the constant offset that it gave",
            checkpoint.folder,
        )
    for particle_id in parts.ensemble.ids:
        state = checkpoint.read(particle_file(particle_id))
        parts.ensemble.load_state(particle_id, state, manifest.health[particle_id])
    if parts.training is not None:
        tensors = [file for file in manifest.files if file.startswith("score/") and file.endswith(".safetensors")]
        parts.training.load_state({file: checkpoint.read(file) for file in tensors})


def _listed(parts: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={part}" for name, part in sorted(parts.items())) or "none"


def largest_part(parts: Run) -> int:
    """Bytes of this rank's part of the largest checkpoint that the run will write; called at its start. The score
    network, which all ranks hold, counts on rank 0 only.

    A trained score network has AdamW's two moments of every parameter, and a full replay. Local.
    """
    config, rounds = parts.config, parts.config.schedule.rounds
    copies = most_copies(rounds, config.checkpoint.every, config.particles.health.good_every)
    total = copies * parts.ensemble.num_bytes
    if parts.world.rank != 0:
        return total
    if parts.training is None:
        return total
    trained = 4 * sum(parts.training.score.num_parameters)
    row = max(_row_bytes(parts, resolution) for resolution in config.render.corners(rounds))
    samples = config.particles.active * config.particles.views
    rows = config.score.replay_rounds * kept_rows(samples, config.score.replay_share, config.particles.views)
    return total + 3 * trained + rows * row


def _row_bytes(parts: Run, resolution: int) -> int:
    """Bytes of one sample at that resolution, taken from the columns of an empty batch."""
    columns = vars(parts.loop.encode([], resolution)).values()
    return sum(column.element_size() * math.prod(column.shape[1:]) for column in columns)
