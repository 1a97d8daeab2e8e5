"""Volume rendering of the samples that matter: rays step through occupied cells only, and what is left is packed.

`march` takes the steps of `sample_intervals` and keeps those whose middle is in an occupied cell; `composite_packed` is
`composite` on what was kept. With every cell occupied both give the dense picture to rounding. Plain torch on every
device, and the reference for kernels: no sum runs over more than one ray, so no ray touches the rounding of another,
and none is by atomics.

Shape legend: P particles, R rays of a particle, S steps a ray, K samples that are kept, G cells along an edge.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distvsd.render.volume import sample_intervals


@dataclass(frozen=True)
class Packed:
    """The K samples on the rays of P particles, in the order of particle, ray and depth.

    particle_ends: `[P]` int64, where the samples of each particle end. ray: `[K]` int64, ascending: p R + r. step:
    `[K]` int64, which of the S steps of its ray it is. starts, ends: `[K]`, of its interval, world units. num_steps: S.
    """

    particle_ends: Tensor
    ray: Tensor
    step: Tensor
    starts: Tensor
    ends: Tensor
    num_steps: int

    @property
    def places(self) -> Tensor:
        """`[K]` int64: where the samples are among all steps of all rays, `[P R S]`."""
        return self.ray * self.num_steps + self.step

    def batches(self) -> list[Batch]:
        """All samples in rows of one particle each, for what is batched over particles.

        On the CPU, where a point costs more than a call and one thread works on a row, a batch has as many particles as
        there are threads, of about as many samples each. Elsewhere it has all.
        """
        counts = self.particle_ends.diff(prepend=self.particle_ends.new_zeros(1))
        on_cpu = counts.device.type == "cpu"
        order = counts.argsort(stable=True).tolist() if on_cpu else list(range(len(counts)))
        size = torch.get_num_threads() if on_cpu else max(len(order), 1)
        return [self._batch(order[first : first + size], counts) for first in range(0, len(order), size)]

    def _batch(self, particles: list[int], counts: Tensor) -> Batch:
        own = counts[particles]
        rows = Rows.of(torch.repeat_interleave(own), own)
        # The samples of a particle are adjacent here and there.
        shift = (self.particle_ends - counts)[particles] - (own.cumsum(0) - own)
        samples = torch.arange(len(rows.place), device=own.device) + shift.repeat_interleave(own)
        return Batch(rows.place, rows.number, rows.most, particles, samples)

    def by_ray(self) -> tuple[Rows, Tensor]:
        """Rows of one ray each, of those with samples, and which rays these are `[Q]`."""
        rays, row, counts = torch.unique_consecutive(self.ray, return_inverse=True, return_counts=True)
        return Rows.of(row, counts), rays


@dataclass(frozen=True)
class Rows:
    """Where packed values are in rows that are padded to the longest. place: `[K]` int64 in the flattened rows."""

    place: Tensor
    number: int
    most: int

    @staticmethod
    def of(row: Tensor, counts: Tensor) -> Rows:
        """row: `[K]`, ascending; counts: how many values each row has."""
        most = int(counts.max()) if len(counts) else 0
        at = torch.arange(len(row), device=row.device)
        return Rows(row * most + at - (counts.cumsum(0) - counts)[row], len(counts), most)

    def spread(self, values: Tensor) -> Tensor:
        """Values `[K, ...]` in rows `[number, most, ...]`, zeros beside them. Differentiable."""
        shape = (self.number, self.most, *values.shape[1:])
        if len(values) == self.number * self.most:
            return values.reshape(shape)
        return (
            values.new_zeros(self.number * self.most, *values.shape[1:]).index_copy(0, self.place, values).view(shape)
        )

    def take(self, rows: Tensor) -> Tensor:
        """The values `[K, ...]` in rows `[number, most, ...]`; the inverse of `spread`. Differentiable."""
        flat = rows.flatten(0, 1)
        taken: Tensor = flat if len(self.place) == len(flat) else _Take.apply(flat, self.place)
        return taken


@dataclass(frozen=True)
class Batch(Rows):
    """Rows of some of the particles. particles: their numbers, one a row. samples: `[k]` int64, which of the packed
    samples are in them, row by row."""

    particles: list[int]
    samples: Tensor


class _Take(torch.autograd.Function):
    """Rows of a tensor, none of them twice. The gradient of indexing adds, in order or by atomics; this one copies."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, flat: Tensor, place: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(place)
        ctx.count = len(flat)  # type: ignore[attr-defined]
        return flat.index_select(0, place)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (place,) = ctx.saved_tensors  # type: ignore[attr-defined]
        zeros = gradient.new_zeros(ctx.count, *gradient.shape[1:])  # type: ignore[attr-defined]
        return zeros.index_copy(0, place, gradient), None


@dataclass(frozen=True)
class PackedComposited:
    """color `[P R, 3]` (premultiplied by opacity), opacity `[P R, 1]`; of_samples: the weight of each, `[K]`."""

    color: Tensor
    opacity: Tensor
    of_samples: Tensor
    packed: Packed

    @property
    def weights(self) -> Tensor:
        """As `composite` gives them, `[P R, S]`: zeros where nothing was read. Differentiable."""
        steps = self.packed.num_steps
        zeros = self.of_samples.new_zeros(len(self.opacity) * steps)
        return zeros.index_copy(0, self.packed.places, self.of_samples).view(-1, steps)


@torch.no_grad()
def march(
    occupied: Tensor, origins: Tensor, directions: Tensor, bound: float, num_samples: int, jitter: Tensor
) -> Packed:
    """The samples of `sample_intervals` whose middle lies in an occupied cell, and whose length is not zero.

    occupied: `[P, G, G, G]` bool over the cube [-bound, bound]^3, x along the last axis as in a hash grid. origins,
    directions: `[P, R, 3]`; jitter: `[P, R]` in [0, 1). Not differentiable.
    """
    cells, particles = occupied.shape[-1], len(occupied)
    starts, ends = sample_intervals(origins, directions, bound, num_samples, jitter)
    middles = (starts + ends) / 2
    index: Tensor | None = None
    for axis in (2, 1, 0):
        # In cells. A middle is in the cube but for rounding.
        first = (origins[..., axis, None] / (2 * bound) + 0.5) * cells
        slope = directions[..., axis, None] * (cells / (2 * bound))
        cell = torch.addcmul(first, slope, middles).clamp_(0, cells - 1).to(torch.int32)
        index = cell if index is None else index.mul_(cells).add_(cell)
    assert index is not None, "three axes were visited"
    owner = torch.arange(particles, device=index.device, dtype=torch.int32)[:, None, None] * cells**3
    kept = occupied.flatten().index_select(0, index.add_(owner).flatten()).view(index.shape)
    kept &= ends > starts
    flat = kept.flatten().nonzero().squeeze(1)
    counts = kept.flatten(1).sum(1)
    return Packed(
        counts.cumsum(0),
        flat // num_samples,
        flat % num_samples,
        starts.flatten().index_select(0, flat),
        ends.flatten().index_select(0, flat),
        num_samples,
    )


def composite_packed(packed: Packed, density: Tensor, color: Tensor, num_rays: int) -> PackedComposited:
    """Max's quadrature of `composite`; rays without samples are clear.

    density: `[K]`; color: `[K, 3]`; num_rays: P R. Differentiable in density and color.
    """
    rows, rays = packed.by_ray()
    optical = rows.spread(density * (packed.ends - packed.starts))
    before = torch.cumsum(optical, dim=1) - optical
    weights = torch.exp(-before) * -torch.expm1(-optical)
    seen = torch.cat((torch.einsum("qs,qsc->qc", weights, rows.spread(color)), weights.sum(1, keepdim=True)), dim=1)
    whole = seen.new_zeros(num_rays, 4).index_copy(0, rays, seen)
    return PackedComposited(whole[:, :3], whole[:, 3:], rows.take(weights), packed)
