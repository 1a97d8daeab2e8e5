"""The multi-resolution hash grid of Instant-NGP (arXiv 2201.05989), batched over particles.

A level whose vertices fit in the table is kept dense, as in Instant-NGP; dense levels are read through
`grid_sample`, which is several times faster than gathering eight corners. `gather_level` is the plain reference for
both, and the path for hashed levels. With `backend="triton"` one kernel reads all levels (`render/kernels/`), with
"tinycudann" the library of that name (`render/tcnn.py`); neither was run on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from distvsd.config import NerfConfig
from distvsd.errors import BackendError
from distvsd.render.kernels import what_is_missing
from distvsd.vsd.rng import Purpose, uniform

GridBackend = Literal["torch", "triton", "tinycudann"]
_PRIMES = (1, 2654435761, 805459861)  # Eq. 4 of arXiv 2201.05989


def grid_backend(
    asked: Literal["auto", "torch", "triton", "tinycudann"], numerics: Literal["fast", "exact"], device: torch.device
) -> GridBackend:
    """The backend that was asked for; auto is triton on CUDA where it is installed and sums need no fixed order.

    Raises BackendError where what was asked for cannot run here, or cannot be exact.
    """
    if asked == "auto":
        is_usable = device.type == "cuda" and numerics == "fast" and what_is_missing(device) is None
        return "triton" if is_usable else "torch"
    if asked == "torch":
        return "torch"
    why = what_is_missing(device) if asked == "triton" else _without_tinycudann(device)
    if numerics == "exact":
        why = "it adds gradients in no fixed order, but parallel.numerics is exact"
    if why is not None:
        raise BackendError(f"render.grid_backend is {asked}, which cannot be used: {why}; or set it to torch")
    return asked


def _without_tinycudann(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it needs CUDA, and this rank is on {device}"
    if find_spec("tinycudann") is None:
        return "it is not installed; install it from its source (github.com/NVlabs/tiny-cuda-nn, bindings/torch)"
    return None


@dataclass(frozen=True)
class HashGrid:
    """The shape of a grid, from the fields of the configuration; the features live in the particles' parameters.

    gather: read dense levels by gathering too; its backward pass can be made deterministic on every device. Read by
    the backend torch only.
    """

    config: NerfConfig
    gather: bool = False
    backend: GridBackend = "torch"

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

        Points outside are read at the nearest face. Raises BackendError where the backend cannot be imported.
        """
        if self.backend != "torch":
            return self._encode_elsewhere(parameters, points)
        return torch.cat(
            [
                self._read(parameters[f"grid{level}"], resolution, points)
                for level, resolution in enumerate(self.resolutions())
            ],
            dim=1,
        )

    def _encode_elsewhere(self, parameters: dict[str, Tensor], points: Tensor) -> Tensor:
        if self.backend == "triton":
            if (why := what_is_missing(points.device)) is not None:
                raise BackendError(f"render.grid_backend is triton, but {why}; or set it to torch")
            from distvsd.render.kernels.hashgrid import encode
        else:
            from distvsd.render.tcnn import encode
        tables = [parameters[f"grid{level}"] for level in range(self.config.levels)]
        return encode(tables, self.resolutions(), self.table_size, self.config.smoothstep, points)

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
