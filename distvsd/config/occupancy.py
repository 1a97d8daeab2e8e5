"""Where a radiance field is read: the coarse grid of a particle that says which parts of its cube hold matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from distvsd.config.ranges import Positive, Range


@dataclass(frozen=True)
class OccupancyConfig:
    """Training renders leave out what is empty (arXiv 2201.05989, appendix C); looking and export read everything."""

    resolution: Annotated[int, Range(0, 256)] = 0
    """Cells along an edge of the cube; 0 reads all of it in every round. All cells count as full until they were
    read."""
    every: Positive = 16
    """Rounds between readings of the density in all cells."""
    threshold: Annotated[float, Range(0, 1, below=True)] = 0.003
    """Largest share of the light that an empty cell stops over the length of its edge."""
    decay: Annotated[float, Range(0, 1, below=True)] = 0.5
    """Factor on what was read before, at each reading; the larger of both is kept. Near 1, what was full stays full."""
