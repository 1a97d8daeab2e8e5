"""How a particle is drawn: hash grids, volume rendering and splatting, batched over particles, each with a plain torch
reference."""

from distvsd.render.hashgrid import HashGrid
from distvsd.render.splat import Splats, Splatted, splat_backend
from distvsd.render.volume import Composited, composite, sample_intervals, volume_backend

__all__ = [
    "Composited",
    "HashGrid",
    "Splats",
    "Splatted",
    "composite",
    "sample_intervals",
    "splat_backend",
    "volume_backend",
]
