"""How a particle is drawn: hash grids, volume rendering and triangle meshes, batched over particles, each with a plain
torch reference."""

from distvsd.render.hashgrid import HashGrid
from distvsd.render.meshes import Meshes, Surface
from distvsd.render.raster import raster_backend, rasterize
from distvsd.render.volume import Composited, composite, sample_intervals, volume_backend

__all__ = [
    "Composited",
    "HashGrid",
    "Meshes",
    "Surface",
    "composite",
    "raster_backend",
    "rasterize",
    "sample_intervals",
    "volume_backend",
]
