"""What tiny-cuda-nn is given, read by an independent copy of its arithmetic: it needs a GPU itself.

The copy is written from `kernel_grid`, `grid_index`, `pos_fract`, `grid_scale` and `grid_resolution` of its source, one
point and one vertex after the other, in Python's integers and numpy's float32.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from distvsd.config import NerfConfig
from distvsd.errors import BackendError
from distvsd.render.hashgrid import HashGrid
from distvsd.render.tcnn import encode, flat_entries, moved

PRIMES = (1, 2654435761, 805459861)


def read_as_tcnn(
    params: Tensor, features: int, resolution: int, log2_table: int, smooth: bool, point: Tensor
) -> Tensor:
    """A grid of one level with this base resolution, at one point."""
    scale = np.float32(resolution) - np.float32(1)  # exp2f(0) * base_resolution - 1
    size = math.ceil(scale) + 1
    entries = min(-(-(size**3) // 8) * 8, 1 << log2_table)
    assert len(params) == entries * features
    position = [float(np.float32(scale) * np.float32(x)) + 0.5 for x in point.tolist()]
    vertex = [math.floor(x) for x in position]
    share = [x - v for x, v in zip(position, vertex, strict=True)]
    if smooth:
        share = [x * x * (3 - 2 * x) for x in share]
    total = torch.zeros(features)
    for corner in range(8):
        weight, place = 1.0, []
        for axis in range(3):
            far = corner >> axis & 1
            weight *= share[axis] if far else 1 - share[axis]
            place.append((vertex[axis] + far) % 2**32)
        if entries < size**3:
            index = 0
            for at, prime in zip(place, PRIMES, strict=True):
                index ^= at * prime % 2**32
        else:
            index = sum(at * size**axis for axis, at in enumerate(place)) % 2**32
        row = index % entries * features
        total += weight * params[row : row + features]
    return total


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize(
    ("resolution", "log2_table"), [(5, 12), (8, 9), (9, 6), (40, 8)], ids=["odd", "whole table", "hashed", "fine"]
)
def test_tables_and_points_in_its_conventions_read_the_same(resolution: int, log2_table: int, smooth: bool) -> None:
    config = NerfConfig(
        levels=1,
        features=2,
        log2_table_size=log2_table,
        base_resolution=resolution,
        max_resolution=resolution,
        smoothstep=smooth,
    )
    grid = HashGrid(config, gather=True)
    tables = grid.init(0, torch.tensor([3]), 1.0)
    inner = torch.rand(1, 40, 3, generator=torch.Generator().manual_seed(0))
    points = torch.cat((inner, torch.tensor([[[0.0, 0, 0], [1, 1, 1], [1, 0, 0.5], [-2, 3, 0.1]]])), dim=1)
    params, where = flat_entries(tables["grid0"])[0], moved(points, resolution)[0]
    found = torch.stack([read_as_tcnn(params, 2, resolution, log2_table, smooth, point) for point in where], dim=1)
    torch.testing.assert_close(found, grid.encode(tables, points)[0], rtol=0, atol=1e-5 * resolution)


def test_gradients_reach_the_tables_and_the_padding_takes_none() -> None:
    table = torch.rand(2, 2, 5, 5, 5, dtype=torch.float64, requires_grad=True)
    flat = flat_entries(table)
    assert flat.shape == (2, 128 * 2) and not flat[:, 250:].any()
    weights = torch.arange(256, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((flat * weights).sum(), table)
    # Entry 7 is z 0, y 1, x 2; feature 1 of it is number 15.
    assert gradient[0, 1, 0, 1, 2] == 15


def test_numbers_of_features_that_it_was_not_compiled_for_are_refused() -> None:
    with pytest.raises(BackendError, match=r"1, 2, 4 or 8 features, but particles\.nerf\.features is 3"):
        encode([torch.zeros(1, 3, 4, 4, 4)], [4], 64, True, torch.zeros(1, 2, 3))


def test_where_it_cannot_be_imported_it_says_where_to_get_it() -> None:
    with pytest.raises(BackendError, match=r"tinycudann, which cannot be imported here.*NVlabs/tiny-cuda-nn.*torch"):
        encode([torch.zeros(1, 2, 4, 4, 4)], [4], 64, True, torch.zeros(1, 2, 3))
