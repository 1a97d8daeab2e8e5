"""The gradient that the particles follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from distvsd.config.ranges import Range, Share
from distvsd.config.schedule import Schedule


@dataclass(frozen=True)
class ObjectiveConfig:
    """The gradient the particles follow."""

    kind: Literal["vsd", "sds", "esd"] = "vsd"
    """vsd: variational score distillation; sds: added noise instead of the score network; esd: entropic."""
    esd_lambda: Share = 0.5
    """ESD only: share of the score that does not see the camera; 0 is VSD."""
    t_min: Annotated[Schedule, Range(0, 1)] = Schedule(((0, 0.02),))
    """Lower end of the particles' diffusion time, as a share of all timesteps."""
    t_max: Annotated[Schedule, Range(0, 1)] = Schedule(((0, 0.98),))
    """Upper end of the particles' diffusion time, as a share of all timesteps; never below t_min."""

    @property
    def needs_score(self) -> bool:
        """Whether a score network is trained."""
        return self.kind != "sds"
