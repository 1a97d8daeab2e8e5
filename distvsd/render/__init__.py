"""How a particle is drawn: hash grids, volume rendering, splatting and triangle meshes, batched over particles, each
with a plain torch reference."""

from distvsd.render.hashgrid import HashGrid, grid_backend
from distvsd.render.meshes import Meshes, Surface
from distvsd.render.raster import raster_backend, rasterize
from distvsd.render.splat import Splats, Splatted, splat_backend
from distvsd.render.volume import Composited, composite, sample_intervals, volume_backend

__all__ = [
    "Composited",
    "HashGrid",
    "Meshes",
    "Splats",
    "Splatted",
    "Surface",
    "composite",
    "grid_backend",
    "raster_backend",
    "rasterize",
    "sample_intervals",
    "splat_backend",
    "volume_backend",
]
