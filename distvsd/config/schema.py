"""A whole run: its sections, one frozen dataclass each, with type, range, default and meaning beside each field.

The loader, the reference of all fields and the round trip to YAML are driven by these annotations alone: a new field
is one line in the file of its section with its docstring below it. Nothing in this package imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from distvsd.config.cameras import CamerasConfig
from distvsd.config.objective import ObjectiveConfig
from distvsd.config.parallel import ParallelConfig
from distvsd.config.particles import ParticlesConfig
from distvsd.config.prior import PriorConfig
from distvsd.config.render import RenderConfig
from distvsd.config.run import CheckpointConfig, LogConfig, RunConfig, ScheduleConfig
from distvsd.config.score import ScoreConfig
from distvsd.config.stages import StageConfig, changed


@dataclass(frozen=True)
class Config:
    """A whole run; every field has a default."""

    run: RunConfig = RunConfig()
    """Where the run lives and what makes its random numbers."""
    prompt: str | tuple[str, ...] = "an object"
    """What is made: one text for all particles, or a list with exactly one per particle; any text of at most 100000
    characters is legal, and lists of at most 20000 texts with 1000000 characters."""
    prior: PriorConfig = PriorConfig()
    """The frozen text-to-image diffusion model that teaches."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """The gradient the particles follow."""
    particles: ParticlesConfig = ParticlesConfig()
    """What is optimised, how many, and how fast."""
    cameras: CamerasConfig = CamerasConfig()
    """Where cameras are drawn from."""
    render: RenderConfig = RenderConfig()
    """How particles are drawn."""
    score: ScoreConfig = ScoreConfig()
    """The shared score network."""
    schedule: ScheduleConfig = ScheduleConfig()
    """How long the run is."""
    parallel: ParallelConfig = ParallelConfig()
    """How ranks work together."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """What is kept for resuming."""
    log: LogConfig = LogConfig()
    """What is reported while training."""
    stages: tuple[StageConfig, ...] = ()
    """Stages that follow each other, each with a name and the fields that it changes; an empty list is a run of one
    stage. Each begins with the particles of the stage before and a new score network. As an override:
    `stages.1.schedule.rounds=50` for the first."""

    @property
    def stage_configs(self) -> tuple[Config, ...]:
        """The configuration of each stage, which has no stages itself; this one where there are none."""
        return tuple(self.with_changes(dict(stage.changes)) for stage in self.stages) or (self,)

    def with_changes(self, changes: Mapping[str, Any]) -> Config:
        """The configuration of a stage with these dotted keys. A stage that trains no score network has the strategy
        flat: there is nothing to divide among the ranks."""
        stage = changed(replace(self, stages=()), changes)
        flat = replace(self.parallel, strategy="flat")
        return stage if stage.objective.needs_score else replace(stage, parallel=flat)

    @property
    def prompts(self) -> tuple[str, ...]:
        """One prompt per particle, in the order of their ids."""
        texts = (self.prompt,) if isinstance(self.prompt, str) else self.prompt
        return texts * self.particles.count if len(texts) == 1 else texts

    @property
    def has_views(self) -> bool:
        """Whether another camera sees another picture of a particle."""
        return self.particles.kind != "image"

    @property
    def reads_cameras(self) -> bool:
        """Whether the score network gets the camera. Not for images, which look the same from every camera; nor where
        the camera is always dropped, because its embedding would then learn only an offset."""
        return self.has_views and self.score.camera_drop < 1

    @property
    def are_latents(self) -> bool:
        """Whether the particles are latents of the prior."""
        return self.particles.kind == "image" and self.particles.image.space == "latent"

    @property
    def final_resolution(self) -> int:
        """Pixels along an edge of a render in the last round."""
        return self.render.resolution_at(self.schedule.rounds - 1)

    def encoded_edge(self, resolution: int, native: int) -> int:
        """Edge in pixels of the image that latents stand for when renders have `resolution`; native: the prior's."""
        return self.render.encoded_edge(resolution, native, self.are_latents)
