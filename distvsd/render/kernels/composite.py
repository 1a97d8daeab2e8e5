"""Emission and absorption along rays whose samples are packed one after the other: colour, opacity and weights.

A program walks along one ray, a block of samples at a time, with a scan inside the block. No two programs write to the
same place, so the same call gives the same bits.

Shape legend: K samples of all rays, n rays.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 32  # samples in one step along a ray: one warp. Not tuned, since nothing here has run on a GPU


def composite(
    ray: Tensor, lengths: Tensor, density: Tensor, color: Tensor, num_rays: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Colour `[n, 3]` (times opacity), opacity `[n, 1]` and weights `[K]`, as `distvsd.render.volume.composite`.

    ray: `[K]` int64, ascending; lengths `[K]`: of the intervals, world units; density `[K]`, at least 0; color
    `[K, 3]`. float32 or float64, the same for all. Differentiable once in density and color.
    """
    ends = torch.searchsorted(ray, torch.arange(num_rays + 1, device=ray.device))
    composited: tuple[Tensor, Tensor, Tensor] = _Composite.apply(ends, lengths, density, color)
    return composited


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ends: Tensor, lengths: Tensor, density: Tensor, color: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        lengths, density, color = lengths.contiguous(), density.contiguous(), color.contiguous()
        rays = len(ends) - 1
        light, opacity = color.new_zeros(rays, 3), color.new_zeros(rays, 1)
        weights, through = torch.empty_like(density), torch.empty_like(density)
        if len(density):
            _walk[(rays,)](*(ends, lengths, density, color, light, opacity, weights, through), BLOCK=BLOCK, num_warps=1)
        ctx.save_for_backward(ends, lengths, color, weights, through)
        return light, opacity, weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_light: Tensor, by_opacity: Tensor, by_weights: Tensor) -> tuple[Tensor | None, ...]:
        ends, lengths, color, weights, through = ctx.saved_tensors
        by_density, by_color = torch.empty_like(weights), torch.empty_like(color)
        if len(weights):
            _walk_back[(len(ends) - 1,)](
                *(ends, lengths, color, weights, through),
                *(by_light.contiguous(), by_opacity.contiguous(), by_weights.contiguous(), by_density, by_color),
                BLOCK=BLOCK,
                num_warps=1,
            )
        return None, None, by_density, by_color


@triton.jit
def _alpha(depth):
    """1 - exp(-depth). Near 0, where the difference would lose its digits, by its series."""
    series = depth * (1 - depth / 2 * (1 - depth / 3 * (1 - depth / 4 * (1 - depth / 5 * (1 - depth / 6)))))
    return tl.where((depth < 0.25) & (depth > -0.25), series, 1 - tl.exp(-depth))


@triton.jit
def _walk(ends, lengths, density, color, light, opacity, weights, through, BLOCK: tl.constexpr):
    ray = tl.program_id(0)
    first, last = tl.load(ends + ray), tl.load(ends + ray + 1)
    lane = tl.arange(0, BLOCK)
    dtype: tl.constexpr = density.dtype.element_ty
    before = tl.zeros([BLOCK], dtype=dtype)  # optical depth up to this block, the same in all lanes
    red, green, blue = tl.zeros([BLOCK], dtype=dtype), tl.zeros([BLOCK], dtype=dtype), tl.zeros([BLOCK], dtype=dtype)
    total = tl.zeros([BLOCK], dtype=dtype)
    for begin in range(first, last, BLOCK):
        at = begin + lane
        inside = at < last
        depth = tl.load(density + at, mask=inside, other=0.0) * tl.load(lengths + at, mask=inside, other=0.0)
        reached = before + tl.cumsum(depth, 0)
        weight = tl.exp(-(reached - depth)) * _alpha(depth)
        tl.store(weights + at, weight, mask=inside)
        tl.store(through + at, tl.exp(-reached), mask=inside)
        red += weight * tl.load(color + 3 * at, mask=inside, other=0.0)
        green += weight * tl.load(color + 3 * at + 1, mask=inside, other=0.0)
        blue += weight * tl.load(color + 3 * at + 2, mask=inside, other=0.0)
        total += weight
        before += tl.sum(depth, 0)
    tl.store(light + 3 * ray, tl.sum(red, 0))
    tl.store(light + 3 * ray + 1, tl.sum(green, 0))
    tl.store(light + 3 * ray + 2, tl.sum(blue, 0))
    tl.store(opacity + ray, tl.sum(total, 0))


@triton.jit
def _walk_back(
    ends,
    lengths,
    color,
    weights,
    through,
    by_light,
    by_opacity,
    by_weights,
    by_density,
    by_color,
    BLOCK: tl.constexpr,
):
    """With q_i the gradient by weight i: by optical depth i it is q_i T_(i+1) minus the sum of q_j w_j over j > i.

    T_(i+1), in `through`, is what passes sample i. The sums are taken from the end of the ray, not as differences.
    """
    ray = tl.program_id(0)
    first, last = tl.load(ends + ray), tl.load(ends + ray + 1)
    lane = tl.arange(0, BLOCK)
    red, green, blue = tl.load(by_light + 3 * ray), tl.load(by_light + 3 * ray + 1), tl.load(by_light + 3 * ray + 2)
    of_opacity = tl.load(by_opacity + ray)
    behind = tl.zeros([BLOCK], dtype=weights.dtype.element_ty)  # the sum over later blocks, the same in all lanes
    for done in range(0, last - first, BLOCK):
        at = last - done - BLOCK + lane
        inside = at >= first
        weight = tl.load(weights + at, mask=inside, other=0.0)
        shade = red * tl.load(color + 3 * at, mask=inside, other=0.0)
        shade += green * tl.load(color + 3 * at + 1, mask=inside, other=0.0)
        shade += blue * tl.load(color + 3 * at + 2, mask=inside, other=0.0)
        gradient = tl.load(by_weights + at, mask=inside, other=0.0) + of_opacity + shade
        moved = gradient * weight
        later = behind + tl.cumsum(moved, 0, reverse=True) - moved
        by_depth = gradient * tl.load(through + at, mask=inside, other=0.0) - later
        tl.store(by_density + at, by_depth * tl.load(lengths + at, mask=inside, other=0.0), mask=inside)
        tl.store(by_color + 3 * at, weight * red, mask=inside)
        tl.store(by_color + 3 * at + 1, weight * green, mask=inside)
        tl.store(by_color + 3 * at + 2, weight * blue, mask=inside)
        behind += tl.sum(moved, 0)
