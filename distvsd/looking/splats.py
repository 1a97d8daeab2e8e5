"""What a file of splats needs of a particle of Gaussians."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from distvsd.particles import Parameters


@runtime_checkable
class Splats(Protocol):
    """Gaussians of P particles: means `[P, N, 3]` world units, log_scales `[P, N, 3]`, quaternions `[P, N, 4]` real
    part first, opacity_logits `[P, N]`, colors `[P, N, 3]` in [0, 1]."""

    @property
    def means(self) -> Tensor: ...

    @property
    def log_scales(self) -> Tensor: ...

    @property
    def quaternions(self) -> Tensor: ...

    @property
    def opacity_logits(self) -> Tensor: ...

    @property
    def colors(self) -> Tensor: ...


@runtime_checkable
class HasSplats(Protocol):
    """A kind of particle that is made of Gaussians."""

    def splats(self, parameters: Parameters) -> Splats:
        """Of one particle, parameters `[1, ...]`."""
        ...
