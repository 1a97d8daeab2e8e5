"""Rays through a particle's occupancy: which of a ray's equal steps lie in occupied cells, packed in their order.

Two passes: each ray counts its samples, the sum of the counts says where it writes, and each ray writes. A program
walks along a block of rays. Nothing is added atomically, so the same call gives the same bits.

Shape legend: P particles, R rays of each, G cells along an axis, K samples that were kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128  # rays of a program; not tuned, since nothing here has run on a GPU


@torch.no_grad()
def march(
    occupied: Tensor, origins: Tensor, directions: Tensor, bound: float, num_samples: int, jitter: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`(particle_ends, ray, step, starts, ends)`: `[P]` int64, where the samples of a particle end; then each `[K]`:
    int64 p R + r, ascending; int64 below num_samples; and the ends of the intervals in world units.

    The intervals are those of `distvsd.render.volume.sample_intervals` with num_samples steps in the cube
    [-bound, bound]^3, of which are kept those longer than 0 whose middle is in an occupied cell. occupied:
    `[P, G, G, G]` bool, x along the last axis. origins, directions: `[P, R, 3]`; jitter: `[P, R]`; float32. Not
    differentiable. The host waits once, for K.
    """
    origins, directions, jitter = origins.contiguous(), directions.contiguous(), jitter.contiguous()
    cells = occupied.contiguous().view(torch.uint8)
    (particles, rays), size = jitter.shape, cells.shape[-1]
    counts = torch.zeros(particles, rays, dtype=torch.int64, device=jitter.device)
    grid = (triton.cdiv(rays, BLOCK), particles)
    given = (cells, origins, directions, jitter, rays, size, num_samples, bound, 2 * bound, size / (2 * bound))
    if counts.numel():
        _walk[grid](*given, counts, None, None, None, None, BLOCK=BLOCK)
    past = counts.flatten().cumsum(0)
    total = int(past[-1]) if counts.numel() else 0
    ray, step = past.new_empty(total), past.new_empty(total)
    starts, ends = jitter.new_empty(total), jitter.new_empty(total)
    if total:
        _walk[grid](*given, past - counts.flatten(), ray, step, starts, ends, BLOCK=BLOCK)
    return counts.sum(1).cumsum(0), ray, step, starts, ends


@triton.jit
def _axis(origins, directions, inside, bound):
    """Of one axis: origin, direction, and where the rays enter and leave the slab."""
    origin = tl.load(origins, mask=inside, other=0.0)
    direction = tl.load(directions, mask=inside, other=1.0)
    safe = tl.where(tl.abs(direction) < 1e-9, 1e-9, direction)
    low, high = (-bound - origin) / safe, (bound - origin) / safe
    return origin, direction, tl.minimum(low, high), tl.maximum(low, high)


@triton.jit
def _cell(origin, direction, middle, size, edge, per_unit):
    """Which cell along an axis; a middle is in the cube but for rounding."""
    cell = (origin / edge + 0.5) * size + direction * per_unit * middle
    return tl.minimum(tl.maximum(cell, 0.0), size - 1.0).to(tl.int64)


@triton.jit
def _walk(
    cells,
    origins,
    directions,
    jitter,
    rays,
    size,
    num_samples,
    bound,
    edge,
    per_unit,
    counts,
    ray_of,
    step_of,
    starts,
    ends,
    BLOCK: tl.constexpr,
):
    """Without `ray_of` it writes counts, with it the samples, from the places that `counts` then has."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    particle = tl.program_id(1).to(tl.int64)
    inside = place < rays
    ray = particle * rays + place
    x, x_slope, x_near, x_far = _axis(origins + 3 * ray, directions + 3 * ray, inside, bound)
    y, y_slope, y_near, y_far = _axis(origins + 3 * ray + 1, directions + 3 * ray + 1, inside, bound)
    z, z_slope, z_near, z_far = _axis(origins + 3 * ray + 2, directions + 3 * ray + 2, inside, bound)
    near = tl.maximum(tl.maximum(tl.maximum(x_near, y_near), z_near), 0.0)
    far = tl.maximum(tl.minimum(tl.minimum(x_far, y_far), z_far), near)
    length = (far - near) / num_samples
    shift = tl.load(jitter + ray, mask=inside, other=0.5) - 0.5
    slot = tl.zeros([BLOCK], dtype=tl.int64)
    if ray_of is not None:
        slot += tl.load(counts + ray, mask=inside, other=0)
    end = tl.minimum(tl.maximum(near + length * shift, near), far)
    for step in range(num_samples):
        start = end
        end = tl.minimum(tl.maximum(near + length * ((step + 1) + shift), near), far)
        middle = (start + end) / 2
        i = _cell(x, x_slope, middle, size, edge, per_unit)
        j = _cell(y, y_slope, middle, size, edge, per_unit)
        k = _cell(z, z_slope, middle, size, edge, per_unit)
        cell = ((particle * size + k) * size + j) * size + i
        kept = inside & (end > start)
        kept = kept & (tl.load(cells + cell, mask=kept, other=0) != 0)
        if ray_of is not None:
            tl.store(ray_of + slot, ray, mask=kept)
            tl.store(step_of + slot, step, mask=kept)
            tl.store(starts + slot, start, mask=kept)
            tl.store(ends + slot, end, mask=kept)
        slot += kept.to(tl.int64)
    if ray_of is None:
        tl.store(counts + ray, slot, mask=inside)
