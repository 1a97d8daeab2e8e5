"""How particles are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from distvsd.config.ranges import Range
from distvsd.config.schedule import Schedule


@dataclass(frozen=True)
class RenderConfig:
    """How particles are drawn."""

    resolution: Annotated[Schedule, Range(8, 4096, multiple_of=8, integer=True)] = Schedule(((0, 64.0),))
    """Edge of the rendered image, pixels; a linear schedule is rounded down to a multiple of 8."""
    encode_resolution: Literal["native", "render"] = "native"
    """native: renders are resized to the edge that the prior was trained at before they are encoded; render: they are
    encoded as they are. Particles that are latents are not encoded."""
    small_latents: bool = False
    """Allows latents with less than a quarter of the edge that the prior was trained at; those images are useless."""
    backend: Literal["auto", "torch", "nerfacc"] = "auto"
    """Of volume rendering; auto takes the fastest installed one that supports parallel.numerics."""
    grid_backend: Literal["auto", "torch", "triton", "tinycudann"] = "auto"
    """Of hash grids; auto takes triton on CUDA where it is installed and parallel.numerics is fast."""
    raster_backend: Literal["auto", "torch", "nvdiffrast", "drtk"] = "auto"
    """Of meshes; auto takes nvdiffrast, or else drtk, on CUDA where it is installed and parallel.numerics is fast."""
    splat_backend: Literal["auto", "torch", "gsplat"] = "auto"
    """Of gaussians; auto takes gsplat on CUDA where it is installed and parallel.numerics is fast."""

    def resolution_at(self, round: int) -> int:
        """Pixels along an edge in this round, always a multiple of 8."""
        return int(self.resolution.at(round)) // 8 * 8

    def encoded_edge(self, resolution: int, native: int, is_latent: bool) -> int:
        """Edge in pixels of the image that latents represent when renders have `resolution`. native: the prior's.
        is_latent: whether the renders are latents themselves."""
        return resolution if is_latent or self.encode_resolution == "render" else native

    def corners(self, rounds: int) -> list[int]:
        """Pixels along an edge where the schedule has a point and in the last round: its extremes are among them."""
        starts = [start for start, _ in self.resolution.points if start < rounds]
        return [self.resolution_at(round) for round in (*starts, rounds - 1)]
