"""Where the particles of a rank are between their turns, from the configuration."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from distvsd.checkpoint.format import particle_file
from distvsd.checkpoint.reader import open_checkpoint, steps
from distvsd.config import Config
from distvsd.errors import CheckpointError, ConfigError
from distvsd.parallel.world import World
from distvsd.particles import Paging
from distvsd.particles.store import at_home_in_memory
from distvsd.runtime.pages import PageFiles, forget_pages
from distvsd.runtime.paths import RunPaths

_log = logging.getLogger("distvsd")


def paging_of(config: Config, world: World, ids: Sequence[int]) -> Paging | None:
    """How this rank's particles take turns; None where all are on the device. Local; every rank calls it.

    Deletes what a killed run left of its pages: a resume reads the checkpoint only. Raises RunError.
    """
    particles, checkpoints = config.particles, RunPaths(Path(config.run.dir)).checkpoints
    root, folder = place_of(config)
    forget_pages(root, folder, world.rank, world.size)
    if particles.turns == 1:
        return None
    in_memory = at_home_in_memory(ids, particles.turns, particles.in_memory * len(ids) // particles.count)
    disk = None
    if len(in_memory) < len(ids):
        if not config.particles.page_dir:
            root.mkdir(parents=True, exist_ok=True)
        disk = PageFiles(root, f"{folder}/rank-{world.rank:05d}")
    return Paging(
        particles.turns,
        in_memory,
        disk,
        keeps_good=config.schedule.rounds > particles.health.good_every,
        backup=lambda particle_id: saved_state(checkpoints, particle_id),
    )


def place_of(config: Config) -> tuple[Path, str]:
    """The folder on whose disk pages are, and the name below it of those of this run. Raises ConfigError."""
    paths = RunPaths(Path(config.run.dir))
    if not config.particles.page_dir:
        return paths.root, paths.pages.name
    root = Path(config.particles.page_dir)
    if not root.is_dir():
        raise ConfigError(f"particles.page_dir is {root}, which is not a folder; make it on every machine of the run")
    return root, f"distvsd-pages-{hashlib.sha256(bytes(paths.root.resolve())).hexdigest()[:16]}"


def saved_state(checkpoints: Path, particle_id: int) -> Mapping[str, Tensor] | None:
    """A particle as the newest checkpoint holds it whose copy of it is sound; None without one."""
    for step in steps(checkpoints):
        try:
            return open_checkpoint(checkpoints, step).read(particle_file(particle_id))
        except CheckpointError as error:
            _log.warning("particle %d is not read from %s", particle_id, error)
    return None
