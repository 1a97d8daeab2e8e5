"""What a particle of Gaussians is to a file of splats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from distvsd.particles import Parameters


@dataclass(frozen=True)
class Splats:
    """Gaussians of P particles, those that are drawn: means `[P, N, 3]` world units, log_scales `[P, N, 3]`,
    quaternions `[P, N, 4]` real part first, opacities `[P, N]` logits, colors `[P, N, 3]` in [0, 1]."""

    means: Tensor
    log_scales: Tensor
    quaternions: Tensor
    opacities: Tensor
    colors: Tensor


@runtime_checkable
class HasSplats(Protocol):
    """A kind of particle that is made of Gaussians."""

    def splats(self, parameters: Parameters) -> Splats:
        """Of one particle, parameters `[1, ...]`."""
        ...
