"""Parts of a run that the caller makes: an extension that needs no change to the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from distvsd.cameras import CameraSampler
from distvsd.networks.base import Adaptable
from distvsd.particles import Particle
from distvsd.vsd.objectives import Objective


@dataclass(frozen=True, kw_only=True)
class Custom:
    """Parts that the caller makes; None: the part is made from the configuration.

    The same on every rank and at every resume: a checkpoint holds the names of their classes only. denoiser: wraps the
    network that was loaded.
    """

    denoiser: Callable[[Adaptable], Adaptable] | None = None
    objective: Objective | None = None
    particle: Particle | None = None
    cameras: CameraSampler | None = None

    def names(self) -> dict[str, str]:
        """The name of each part that is given, of its class where it is an object, for the manifest of checkpoints."""
        parts = {name: part for name, part in vars(self).items() if part is not None}
        return {name: getattr(part, "__name__", type(part).__name__) for name, part in parts.items()}
