"""How a particle is drawn: hash grids and volume rendering, batched over particles, each with a plain torch
reference."""

from distvsd.render.hashgrid import HashGrid
from distvsd.render.volume import Composited, composite, sample_intervals, volume_backend

__all__ = ["Composited", "HashGrid", "composite", "sample_intervals", "volume_backend"]
