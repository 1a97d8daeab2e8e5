"""The multi-resolution hash grid of Instant-NGP (arXiv 2201.05989), batched over particles.

A level whose vertices fit in the table is kept dense, as in Instant-NGP; dense levels are read through
`grid_sample`, which is several times faster than gathering eight corners. `gather_level` is the plain reference for
both, and the path for hashed levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distvsd.config import NerfConfig
from distvsd.vsd.rng import Purpose, uniform

_PRIMES = (1, 2654435761, 805459861)  # Eq. 4 of arXiv 2201.05989


@dataclass(frozen=True)
class HashGrid:
    """The shape of a grid, from the fields of the configuration; the features live in the particles' parameters.

    gather: read dense levels by gathering too; its backward pass can be made deterministic on every device.
    """

    config: NerfConfig
    gather: bool = False

    @property
    def table_size(self) -> int:
        """The most entries of a level; 2^19 in Instant-NGP."""
        return 1 << self.config.log2_table_size

    def resolutions(self) -> list[int]:
        """Vertices along an axis, one per level."""
        shape = self.config
        if shape.levels == 1:
            return [shape.base_resolution]
        growth = (shape.max_resolution / shape.base_resolution) ** (1 / (shape.levels - 1))
        # The small addition keeps a power that should be whole from falling below it by rounding.
        return [int(shape.base_resolution * growth**level + 1e-6) for level in range(shape.levels)]

    def is_dense(self, resolution: int) -> bool:
        return resolution**3 <= self.table_size

    def init(self, seed: int, ids: Tensor, scale: float) -> dict[str, Tensor]:
        """Features uniform in [-scale, scale], each particle's from its own stream: `grid{l}` of `[P, F, R, R, R]`
        or `[P, F, T]`."""
        parameters = {}
        for level, resolution in enumerate(self.resolutions()):
            shape = (resolution,) * 3 if self.is_dense(resolution) else (self.table_size,)
            values = uniform(seed, Purpose.INIT, ids, 0, (self.config.features, *shape), lane=level)
            parameters[f"grid{level}"] = (values * 2 - 1) * scale
        return parameters

    def encode(self, parameters: dict[str, Tensor], points: Tensor) -> Tensor:
        """Features `[P, L F, N]` at points `[P, N, 3]` in the unit cube (x, y, z); differentiable in parameters and
        points.

        Points outside are read at the nearest face.
        """
        return torch.cat(
            [
                self._read(parameters[f"grid{level}"], resolution, points)
                for level, resolution in enumerate(self.resolutions())
            ],
            dim=1,
        )

    def _read(self, grid: Tensor, resolution: int, points: Tensor) -> Tensor:
        position = points.clamp(0, 1) * (resolution - 1)
        if grid.ndim == 3 or self.gather:
            return gather_level(grid.flatten(2), resolution, position, self.config.smoothstep, hashed=grid.ndim == 3)
        if self.config.smoothstep:
            cell = position.floor()
            position = cell + _smoothstep(position - cell)
        unit = position * (2 / (resolution - 1)) - 1
        # grid_sample takes the fastest axis first, which is the last of the grid: x runs along dimension 4.
        return torch.nn.functional.grid_sample(
            grid, unit[:, None, None], mode="bilinear", padding_mode="border", align_corners=True
        )[:, :, 0, 0]


def gather_level(table: Tensor, resolution: int, position: Tensor, smoothstep: bool, hashed: bool) -> Tensor:
    """Trilinear features `[P, F, N]` of one level: table `[P, F, T]`, position `[P, N, 3]` in vertices.

    The reference: eight gathers and a weighted sum, dense (x fastest) or through the spatial hash.
    """
    cell = position.detach().floor().clamp(max=resolution - 2)
    fraction = position - cell
    if smoothstep:
        fraction = _smoothstep(fraction)
    # The near and the far side of the cell, by axis. Offsets and primes are Python numbers: as tensors, each would be a
    # copy to the device that the host waits for.
    vertices = [(near, near + 1) for near in cell.long().unbind(-1)]
    shares = [(1 - far, far) for far in fraction.unbind(-1)]
    total: Tensor | None = None
    for x, y, z in ((x, y, z) for z in (0, 1) for y in (0, 1) for x in (0, 1)):
        i, j, k = vertices[0][x], vertices[1][y], vertices[2][z]
        if hashed:
            index = (i * _PRIMES[0] ^ j * _PRIMES[1] ^ k * _PRIMES[2]) % table.shape[2]
        else:
            index = (k * resolution + j) * resolution + i
        share = shares[0][x] * shares[1][y] * shares[2][z]
        term = table.gather(2, index[:, None].expand(-1, table.shape[1], -1)) * share[:, None]
        total = term if total is None else total + term
    assert total is not None, "eight corners were summed"
    return total


def _smoothstep(x: Tensor) -> Tensor:
    return x * x * (3 - 2 * x)
