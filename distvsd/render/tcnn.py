"""The hash grid read by tiny-cuda-nn (github.com/NVlabs/tiny-cuda-nn), for particles whose tables are ours.

Written from that project's source of April 2026 (`include/tiny-cuda-nn/encodings/grid.h`, `common_device.h`), and not
run: it needs a GPU. What the source says, and what follows:

- A level with base resolution b and growth g reads at x (b g^l - 1) + 1/2, in vertices. Ours have no half, and whole
  resolutions. A module of one level has exactly the resolution it is given, and a point moved by half a cell cancels
  the half, to the rounding of float32. So a module has one level, and one grid of 16 levels takes 16 calls.
- It is dense where R^3 rounded up to a multiple of 8 fits into the table, x fastest, and hashed by the same primes
  elsewhere; of the parameters features vary fastest. Ours are copied into that order for each call.
- It knows one grid a module, so particles take turns: this is a check and a baseline, and not meant to be fast.
- At the last vertex it takes the cell beyond it, with a share of 0: equal in value, while the gradient by the point is
  that of another cell.

Shape legend: P particles, N points, L levels, F features.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from distvsd.errors import BackendError

FEATURES = (1, 2, 4, 8)  # what it was compiled for


def encode(
    tables: Sequence[Tensor], resolutions: Sequence[int], table_size: int, smoothstep: bool, points: Tensor
) -> Tensor:
    """Features `[P, L F, N]` in float32 at points `[P, N, 3]` in the unit cube, on CUDA.

    Arguments and result are those of `distvsd.render.kernels.hashgrid.encode`. Raises BackendError for numbers of
    features that tiny-cuda-nn has not, and where it cannot be imported.
    """
    features = tables[0].shape[1]
    if features not in FEATURES:
        raise BackendError(
            f"render.grid_backend is tinycudann, which has grids of 1, 2, 4 or 8 features, but particles.nerf.features "
            f"is {features}; choose one of them, or another render.grid_backend"
        )
    rows = []
    for table, resolution in zip(tables, resolutions, strict=True):
        module = _module(features, resolution, table_size.bit_length() - 1, smoothstep, points.device)
        flat, where = flat_entries(table), moved(points, resolution)
        rows.append(torch.stack([_call(module, *given, features) for given in zip(flat, where, strict=True)]))
    return torch.cat(rows, dim=2).transpose(1, 2)


def flat_entries(table: Tensor) -> Tensor:
    """A level's parameters `[P, n F]` in tiny-cuda-nn's order and size, from `[P, F, R, R, R]` or `[P, F, T]`.

    Differentiable. A dense level ends with zeros that make its entries a multiple of 8.
    """
    entries = table.flatten(2).transpose(1, 2)
    return torch.nn.functional.pad(entries, (0, 0, 0, -entries.shape[1] % 8)).flatten(1)


def moved(points: Tensor, resolution: int) -> Tensor:
    """Where tiny-cuda-nn reads what `HashGrid` reads at points `[P, N, 3]`: half a cell before. Differentiable."""
    return points.clamp(0, 1) - 0.5 / (resolution - 1)


def _call(module: torch.nn.Module, parameters: Tensor, points: Tensor, features: int) -> Tensor:
    if len(points) == 0:
        return parameters[:0].reshape(0, features)
    read: Tensor = torch.func.functional_call(module, {"params": parameters}, (points,))
    return read


@functools.lru_cache(maxsize=64)
def _module(
    features: int, resolution: int, log2_table_size: int, smoothstep: bool, device: torch.device
) -> torch.nn.Module:
    """A grid of one level. Its own parameters are never read."""
    try:
        import tinycudann
    except (ImportError, OSError) as error:  # it raises EnvironmentError where it finds no GPU
        raise BackendError(
            f"render.grid_backend is tinycudann, which cannot be imported here ({error}); install it from its source "
            "(github.com/NVlabs/tiny-cuda-nn, bindings/torch), or set render.grid_backend=torch"
        ) from error
    encoding = {
        "otype": "HashGrid",
        "n_levels": 1,
        "n_features_per_level": features,
        "log2_hashmap_size": log2_table_size,
        "base_resolution": resolution,
        "per_level_scale": 1.0,
        "interpolation": "Smoothstep" if smoothstep else "Linear",
    }
    with torch.cuda.device(device):
        module: torch.nn.Module = tinycudann.Encoding(3, encoding, dtype=torch.float32)
    return module
