"""The stages of a run: a configuration and a run directory each, and the particles that one hands over to the next.

A run without `stages` in its configuration is one stage, and its directory is the run's own. With stages, stage 2 named
fine has the directory RUN/stages/2-fine, a run directory like any other. RUN itself holds config.yaml, STATUS.json, the
lock and the heartbeats.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from distvsd.checkpoint.format import particle_file
from distvsd.checkpoint.reader import Checkpoint, steps
from distvsd.config import Config, load_config
from distvsd.errors import RunError
from distvsd.particles.base import Handed, Particle
from distvsd.particles.stored import blank_state, read_particle
from distvsd.runtime import inside
from distvsd.runtime.paths import RunPaths
from distvsd.runtime.status import State, write_status

FOLDER = "stages"
_NAME = re.compile(r"(\d+)-[a-z0-9][a-z0-9_-]*", re.ASCII)


@dataclass(frozen=True)
class Stage:
    """One stage of a run. whole: the run's configuration. number: from 1."""

    whole: Config
    number: int

    @property
    def count(self) -> int:
        """Stages of the run."""
        return max(len(self.whole.stages), 1)

    @property
    def run(self) -> RunPaths:
        """The directory of the whole run."""
        return RunPaths(Path(self.whole.run.dir))

    @property
    def folder(self) -> str:
        """The stage's directory below the run's; empty where they are the same."""
        return f"{FOLDER}/{self.number}-{self.whole.stages[self.number - 1].name}" if self.whole.stages else ""

    @property
    def paths(self) -> RunPaths:
        """The stage's own directory."""
        return RunPaths(self.run.root / self.folder)

    @cached_property
    def config(self) -> Config:
        """The stage's own configuration, as its config.yaml has it: run.dir is the stage's directory."""
        if not self.whole.stages:
            return self.whole
        config = self.whole.stage_configs[self.number - 1]
        name = f"{config.log.wandb_name or self.run.root.resolve().name} {Path(self.folder).name}"
        directory = str(Path(self.whole.run.dir) / self.folder)
        run = replace(config.run, dir=directory, seed=_seed(config.run.seed, self.number))
        return replace(config, run=run, log=replace(config.log, wandb_name=name))

    def create(self) -> None:
        """Makes the stage's directory where it is missing. Raises RunError."""
        if self.folder:
            inside.make_folder(self.run.root, self.folder)
        self.paths.create()

    def report(self, state: State, completed: int, message: str = "") -> None:
        """Writes STATUS.json of the stage and of the run; the run is done only with its last stage. Rank 0 only. Raises
        RunError. completed: rounds of this stage."""
        self.report_run("running" if state == "done" and self.number < self.count else state, completed, message)
        if self.folder:
            write_status(self.paths.status, state, completed, self.config.schedule.rounds, message)

    def report_run(self, state: State, completed: int, message: str = "") -> None:
        """Writes STATUS.json of the run alone; its rounds are those of all stages together. completed: as `report`."""
        rounds = [config.schedule.rounds for config in self.whole.stage_configs]
        write_status(self.run.status, state, sum(rounds[: self.number - 1]) + completed, sum(rounds), message)

    def has_begun(self) -> bool:
        """Whether it has a published checkpoint."""
        return bool(steps(self.paths.checkpoints))


def _seed(seed: int, number: int) -> int:
    """Of a stage: the first has the run's. Rounds begin at 0 in every stage, and with one seed for all, round k would
    draw the noise and the cameras of round k of the stage before."""
    return (seed + (number - 1) * 0x9E3779B97F4A7C15) % 2**63


def stages_of(config: Config) -> list[Stage]:
    """The stages of a run in order, at least one."""
    return [Stage(config, number) for number in range(1, max(len(config.stages), 1) + 1)]


def stage_before(stage: Stage) -> Stage | None:
    """The stage whose particles this one begins with: the one before it, or for the first stage the newest of the run
    in `run.init_from`. None where particles begin anew.

    Raises RunError where that directory holds no run with a checkpoint, ConfigError where its configuration is damaged.
    """
    if stage.number > 1:
        return Stage(stage.whole, stage.number - 1)
    if not stage.whole.run.init_from:
        return None
    paths = RunPaths(Path(stage.whole.run.init_from))
    if not paths.config.is_file():
        raise RunError(
            f"run.init_from is {paths.root}, which holds no config.yaml; give the directory of a run, or leave it empty"
        )
    whole = load_config(paths.config)
    other = stages_of(replace(whole, run=replace(whole.run, dir=str(paths.root))))
    begun = [each for each in other if each.has_begun()]
    if not begun:
        raise RunError(
            f"run.init_from is {paths.root}, a run without a checkpoint; train it, or leave run.init_from empty"
        )
    return begun[-1]


def refuse_other_stages(config: Config) -> None:
    """Raises RunError where the run's directory holds checkpoints of stages that this configuration does not have."""
    root = RunPaths(Path(config.run.dir)).root
    known = {stage.paths.root for stage in stages_of(config)}
    strange = [folder for folder in (root, *stage_folders(root)) if folder not in known]
    found = next((folder for folder in strange if steps(RunPaths(folder).checkpoints)), None)
    if found is not None:
        wanted = ", ".join(stage.folder for stage in stages_of(config) if stage.folder) or "no stages"
        raise RunError(
            f"{found} holds checkpoints, but the configuration has {wanted}; choose another run.dir, or give the "
            "configuration the stages that the run was begun with"
        )


def stage_folders(run: Path) -> list[Path]:
    """The directories of a run's stages that are on the disk, first stage first; none for a run without stages.

    Raises RunError for a link or a file in the place of a folder.
    """
    found = [match for name in inside.names(run, FOLDER) if (match := _NAME.fullmatch(name))]
    names = [match[0] for match in sorted(found, key=lambda match: int(match[1]))]
    for name in names:
        inside.expect_folder(run, f"{FOLDER}/{name}")
    return [run / FOLDER / name for name in names]


def newest_stage(run: Path) -> Path:
    """The directory that commands on a run read: that of the last stage with a checkpoint, or of the first stage where
    none has one; the run's own where it has no stages."""
    folders = stage_folders(run) or [run]
    return next((folder for folder in reversed(folders) if steps(RunPaths(folder).checkpoints)), folders[0])


@dataclass(frozen=True)
class HandOver:
    """Particles `ids` of a checkpoint of the stage before, read when they are asked for; see `hand_over`."""

    checkpoint: Checkpoint
    particle: Particle
    ids: Sequence[int]

    def rows(self, rows: slice) -> Handed:
        return hand_over(self.checkpoint, self.particle, self.ids[rows])


def hand_over(checkpoint: Checkpoint, particle: Particle, ids: Sequence[int]) -> Handed:
    """The particles `ids` as the last checkpoint of a stage holds them, on the CPU; rows in the order of `ids`.

    particle: of that stage. Health and optimiser are not handed over. Local. Raises CheckpointError.
    """
    like, manifest = blank_state(particle), checkpoint.manifest
    rows = []
    for particle_id in ids:
        tensors = checkpoint.read(particle_file(particle_id))
        read_particle(particle_id, like, tensors, manifest.health[particle_id], manifest.step)
        rows.append(tensors)
    names = [name for name in like if name.startswith("param/")]
    parameters = {
        name.removeprefix("param/"): torch.stack([row[name] for row in rows])
        if rows
        else like[name].new_zeros(0, *like[name].shape)
        for name in names
    }
    return Handed(particle, parameters)
