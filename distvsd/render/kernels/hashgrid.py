"""The hash grid's levels in one launch, forward and backward; `HashGrid.encode` with plain torch is the reference.

A program reads one level of one particle at a block of points. The tables of all levels are first copied into one
tensor in which the features of an entry are neighbours, so that a corner costs one memory sector whatever the layout
of the parameters. Sums and weights have the dtype of the points. The backward pass adds with atomics, in no fixed
order.

Shape legend: P particles, N points, L levels, F features, E entries of all levels together.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 256  # points of a program; not tuned, since nothing here has run on a GPU


def encode(
    tables: Sequence[Tensor], resolutions: Sequence[int], table_size: int, smoothstep: bool, points: Tensor
) -> Tensor:
    """Features `[P, L F, N]`, in the dtype of the points, at points `[P, N, 3]` in the unit cube.

    tables: `[P, F, R, R, R]` (x fastest) or `[P, F, T]` for each of the resolutions R, of one floating dtype; T is
    table_size, a power of two. Differentiable once in tables and points, whose gradients add up in the points' dtype.
    Points outside of the cube are read at the nearest face; where a coordinate is NaN, so are the features.
    """
    entries = torch.cat([table.flatten(2) for table in tables], dim=2).transpose(1, 2)
    layout = _layout(tuple(resolutions), tuple(table.ndim == 3 for table in tables), table_size, points.device)
    encoded: Tensor = _Encode.apply(entries, points, layout, table_size, smoothstep)
    return encoded


@functools.lru_cache(maxsize=16)
def _layout(resolutions: tuple[int, ...], hashed: tuple[bool, ...], table_size: int, device: torch.device) -> Tensor:
    """`[L, 3]` int64: vertices along an axis, whether hashed, first entry. Kept, so that no call waits for a copy."""
    sizes = [table_size if is_hashed else size**3 for size, is_hashed in zip(resolutions, hashed, strict=True)]
    rows = [(size, hashed[level], sum(sizes[:level])) for level, size in enumerate(resolutions)]
    return torch.tensor(rows, dtype=torch.int64, device=device)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, entries: Tensor, points: Tensor, layout: Tensor, table_size: int, smoothstep: bool) -> Tensor:
        entries, points = entries.contiguous(), points.contiguous()
        ctx.save_for_backward(entries, points, layout)
        ctx.table_size, ctx.smoothstep = table_size, smoothstep
        encoded = points.new_empty(len(points), len(layout) * entries.shape[2], points.shape[1])
        if encoded.numel():
            _read[_grid(points, layout)](
                *(points, entries, layout, encoded, points.shape[1], entries.shape[1], table_size),
                **_constants(entries, layout, smoothstep),
            )
        return encoded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        entries, points, layout = ctx.saved_tensors
        to_entries = torch.zeros_like(entries, dtype=points.dtype) if ctx.needs_input_grad[0] else None
        to_points = torch.zeros_like(points) if ctx.needs_input_grad[1] else None
        if gradient.numel():
            _add[_grid(points, layout)](
                *(points, entries, layout, gradient.contiguous(), to_entries, to_points),
                *(points.shape[1], entries.shape[1], ctx.table_size),
                **_constants(entries, layout, ctx.smoothstep),
            )
        return None if to_entries is None else to_entries.to(entries.dtype), to_points, None, None, None


def _grid(points: Tensor, layout: Tensor) -> tuple[int, int, int]:
    """Blocks of points vary fastest, then levels: what runs at the same time reads one level and shares its cache."""
    return triton.cdiv(points.shape[1], BLOCK), len(layout), points.shape[0]


def _constants(entries: Tensor, layout: Tensor, smoothstep: bool) -> dict[str, int | bool]:
    features = entries.shape[2]
    width = triton.next_power_of_2(features)
    return {"FEATURES": features, "WIDTH": width, "LEVELS": len(layout), "SMOOTH": smoothstep, "BLOCK": BLOCK}


@triton.jit
def _axis(coordinates, inside, resolution, SMOOTH: tl.constexpr):
    """Of one axis: the nearer vertex, the share of the farther one, and the share's derivative by the coordinate."""
    coordinate = tl.load(coordinates, mask=inside, other=0.0)
    # Written so that NaN stays NaN.
    unit = tl.where(coordinate < 0, 0.0, tl.where(coordinate > 1, 1.0, coordinate)).to(coordinate.dtype)
    position = unit * (resolution - 1)
    # Bounded as an integer: a coordinate that is NaN must not read beyond the table.
    vertex = tl.minimum(tl.maximum(tl.floor(position).to(tl.int32), 0), resolution - 2)
    share = position - vertex
    slope = tl.where((coordinate < 0) | (coordinate > 1), 0.0, 1.0).to(coordinate.dtype) * (resolution - 1)
    if SMOOTH:
        slope = slope * 6 * share * (1 - share)
        share = share * share * (3 - 2 * share)
    return vertex, share, slope


@triton.jit
def _entry(x, y, z, resolution, is_hashed, table_size):
    """Entry of a vertex in its level: x fastest, or Eq. 4 of arXiv 2201.05989 in its own arithmetic of 32 bits."""
    dense = (z * resolution + y) * resolution + x
    spatial = x.to(tl.uint32) ^ (y.to(tl.uint32) * 2654435761) ^ (z.to(tl.uint32) * 805459861)
    return tl.where(is_hashed, (spatial & (table_size - 1).to(tl.uint32)).to(tl.int32), dense).to(tl.int64)


@triton.jit
def _read(
    points,
    entries,
    layout,
    encoded,
    count,
    num_entries,
    table_size,
    FEATURES: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    level, particle = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = place < count
    resolution = tl.load(layout + 3 * level).to(tl.int32)
    is_hashed = tl.load(layout + 3 * level + 1) != 0
    at = points + 3 * (particle * count + place)
    x, far_x, _ = _axis(at, inside, resolution, SMOOTH)
    y, far_y, _ = _axis(at + 1, inside, resolution, SMOOTH)
    z, far_z, _ = _axis(at + 2, inside, resolution, SMOOTH)
    feature = tl.arange(0, WIDTH)[None, :]
    kept = inside[:, None] & (feature < FEATURES)
    table = entries + (particle * num_entries + tl.load(layout + 3 * level + 2)) * FEATURES + feature
    total = tl.zeros([BLOCK, WIDTH], dtype=far_x.dtype)
    for corner in tl.static_range(8):
        dx, dy, dz = corner % 2, corner // 2 % 2, corner // 4
        share = (far_x if dx else 1 - far_x) * (far_y if dy else 1 - far_y) * (far_z if dz else 1 - far_z)
        entry = _entry(x + dx, y + dy, z + dz, resolution, is_hashed, table_size)
        value = tl.load(table + entry[:, None] * FEATURES, mask=kept, other=0.0)
        total += value.to(total.dtype) * share[:, None]
    row = (particle * LEVELS + level) * FEATURES + feature
    tl.store(encoded + row * count + place[:, None], total, mask=kept)


@triton.jit
def _add(
    points,
    entries,
    layout,
    gradients,
    to_entries,
    to_points,
    count,
    num_entries,
    table_size,
    FEATURES: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    level, particle = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = place < count
    resolution = tl.load(layout + 3 * level).to(tl.int32)
    is_hashed = tl.load(layout + 3 * level + 1) != 0
    at = 3 * (particle * count + place)
    x, far_x, slope_x = _axis(points + at, inside, resolution, SMOOTH)
    y, far_y, slope_y = _axis(points + at + 1, inside, resolution, SMOOTH)
    z, far_z, slope_z = _axis(points + at + 2, inside, resolution, SMOOTH)
    feature = tl.arange(0, WIDTH)[None, :]
    kept = inside[:, None] & (feature < FEATURES)
    row = (particle * LEVELS + level) * FEATURES + feature
    gradient = tl.load(gradients + row * count + place[:, None], mask=kept, other=0.0)
    first = (particle * num_entries + tl.load(layout + 3 * level + 2)) * FEATURES + feature
    by_x = tl.zeros([BLOCK], dtype=far_x.dtype)
    by_y = tl.zeros([BLOCK], dtype=far_x.dtype)
    by_z = tl.zeros([BLOCK], dtype=far_x.dtype)
    for corner in tl.static_range(8):
        dx, dy, dz = corner % 2, corner // 2 % 2, corner // 4
        share_x, share_y, share_z = far_x if dx else 1 - far_x, far_y if dy else 1 - far_y, far_z if dz else 1 - far_z
        entry = first + _entry(x + dx, y + dy, z + dz, resolution, is_hashed, table_size)[:, None] * FEATURES
        if to_entries is not None:
            tl.atomic_add(to_entries + entry, gradient * (share_x * share_y * share_z)[:, None], kept, sem="relaxed")
        if to_points is not None:
            value = tl.load(entries + entry, mask=kept, other=0.0).to(gradient.dtype)
            along = tl.sum(gradient * value, axis=1)
            by_x += (2 * dx - 1) * along * share_y * share_z
            by_y += (2 * dy - 1) * along * share_x * share_z
            by_z += (2 * dz - 1) * along * share_x * share_y
    if to_points is not None:
        # The levels of a point add here, each from a program of its own.
        tl.atomic_add(to_points + at, by_x * slope_x, inside, sem="relaxed")
        tl.atomic_add(to_points + at + 1, by_y * slope_y, inside, sem="relaxed")
        tl.atomic_add(to_points + at + 2, by_z * slope_z, inside, sem="relaxed")
