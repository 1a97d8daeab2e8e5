"""Which parts of a radiance field's cube hold matter: a coarse grid a particle, read anew every few rounds.

After Instant-NGP (arXiv 2201.05989, appendix C): a decaying maximum of the density at a random point of every cell. The
grid is a frozen parameter of the particle. All of it follows from the trained ones, so one that is put back to an
earlier state begins with a grid that was never read, in which every cell counts as occupied.

Shape legend: P particles, G cells along an edge.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distvsd.cameras import Field
from distvsd.config.occupancy import OccupancyConfig
from distvsd.particles.base import Keys
from distvsd.vsd.rng import Purpose, uniform

_AT_ONCE = 2**18  # points
_UNREAD = -1.0


@dataclass(frozen=True)
class Occupancy:
    """config: the fields of `particles.nerf.occupancy`. bound: half the edge of the cube, world units.

    The values of a grid `[P, G, G, G]`, x along the last axis, are shares of light that the cells stop over the length
    of their edge, or -1 in cells that were never read.
    """

    config: OccupancyConfig
    bound: float

    def init(self, ids: Tensor) -> Tensor:
        return torch.full((len(ids), *(self.config.resolution,) * 3), _UNREAD, device=ids.device)

    def cells(self, values: Tensor) -> Tensor:
        """Which cells of a grid are occupied, bool of the same shape.

        A NaN counts as occupied: it must reach the picture, where it is found. So does every cell of a particle that
        would have none: what has faded must be seen by the penalties, and be able to come back.
        """
        read_as_empty = (values >= 0) & (values <= self.config.threshold)
        return ~read_as_empty | read_as_empty.flatten(1).all(1)[:, None, None, None]

    def is_due(self, step: int) -> bool:
        """Whether the grid is read after the update of this round."""
        return self.config.resolution > 0 and (step + 1) % self.config.every == 0

    @torch.no_grad()
    def refreshed(self, values: Tensor, field: Field, keys: Keys) -> Tensor:
        """The grid after one more reading of the density; of the same shape, and nothing in place.

        The points are keyed by (seed, particle, round). A cell takes the largest value among itself and its neighbours:
        matter may grow by one cell until the next reading, and a cell's own point may miss what is at its edge.
        """
        size, edge = self.config.resolution, 2 * self.bound / self.config.resolution
        axis = torch.arange(size, device=values.device)
        corners = torch.cartesian_prod(axis, axis, axis).flip(1)  # x fastest
        places = uniform(keys.seed, Purpose.OCCUPANCY, keys.ids, keys.step, (size**3, 3))
        points = (corners + places) * edge - self.bound
        chunk = max(1, _AT_ONCE // max(1, len(values)))
        density = torch.cat([field(part) for part in points.split(chunk, dim=1)], dim=1)
        stopped = -torch.expm1(-edge * density).reshape(values.shape)
        largest = torch.nn.functional.max_pool3d(stopped[:, None], 3, stride=1, padding=1)[:, 0]
        return torch.maximum(values * self.config.decay, largest)
