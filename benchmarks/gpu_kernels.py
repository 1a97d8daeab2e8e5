"""Every kernel beside plain torch, and beside tinycudann and nerfacc where they are installed: time and difference."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.phases import synchronise
from distvsd.cameras import OrbitSampler, rays
from distvsd.config import CamerasConfig, NerfConfig
from distvsd.particles import Keys, NerfParticle
from distvsd.render import HashGrid, composite, sample_intervals
from distvsd.render.hashgrid import GridBackend
from distvsd.render.kernels import what_is_missing
from distvsd.render.volume import nerfacc_packed_weights
from distvsd.vsd.rng import Purpose, uniform

Call = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Sizes:
    """Of the measured calls. grid: the paper's hash grid. points: of a particle; edge: pixels a side; cells: along an
    axis of the occupancy; repeats: of a timed call."""

    grid: NerfConfig
    particles: int
    points: int
    edge: int
    cells: int
    repeats: int


PAPER = NerfConfig(init_scale=0.1)
FULL = Sizes(grid=PAPER, particles=4, points=2**20, edge=512, cells=64, repeats=20)
SMALL = NerfConfig(levels=2, log2_table_size=9, base_resolution=4, max_resolution=16, samples_per_ray=8, init_scale=0.1)
SMOKE = Sizes(grid=SMALL, particles=2, points=300, edge=8, cells=4, repeats=1)


def milliseconds(call: Call, device: torch.device, repeats: int) -> float:
    """Median of single calls, each waited for, after one that compiles and warms up."""
    call()
    times = []
    for _ in range(repeats):
        synchronise(device)
        began = time.perf_counter()
        call()
        synchronise(device)
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def compared(name: str, calls: dict[str, Call], device: torch.device, repeats: int) -> Iterator[str]:
    """Rows of the table, the reference first; a call without enough memory, or whose library refuses, says so."""
    reference: tuple[Tensor, ...] | None = None
    for backend, call in calls.items():
        try:
            found = tuple(value.detach() for value in call())
            spent = f"{milliseconds(call, device, repeats):.3f}"
        except (torch.OutOfMemoryError, RuntimeError, ImportError) as error:
            yield f"| {name} | {backend} | {type(error).__name__}: {str(error).splitlines()[0][:80]} | |"
            continue
        if reference is None:
            reference, text = found, "reference"
        else:
            text = f"{max(_difference(ours, theirs) for ours, theirs in zip(found, reference, strict=True)):.1e}"
        yield f"| {name} | {backend} | {spent} | {text} |"


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, in units of the reference's largest number; infinite where the shapes differ."""
    if ours.shape != theirs.shape:
        return float("inf")
    if not ours.numel():
        return 0.0
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp_min(1e-12))


def kernel_table(sizes: Sizes, device: torch.device) -> Iterator[str]:
    yield "| kernel | backend | ms | largest difference, of the largest number |"
    yield "|---|---|---:|---:|"
    repeats = sizes.repeats
    yield from compared("hash grid, forward", dict(_encodings(sizes, device, backward=False)), device, repeats)
    yield from compared("hash grid, forward and backward", dict(_encodings(sizes, device, True)), device, repeats)
    bundle = _bundle(sizes, device)
    yield from compared("march", dict(_marches(sizes, *bundle)), device, repeats)
    yield from compared("composite, forward", dict(_composites(sizes, *bundle, backward=False)), device, repeats)
    yield from compared(
        "composite, forward and backward", dict(_composites(sizes, *bundle, backward=True)), device, repeats
    )


def _encodings(sizes: Sizes, device: torch.device, backward: bool) -> Iterator[tuple[str, Call]]:
    ids = torch.arange(sizes.particles, device=device)
    start = HashGrid(sizes.grid).init(0, ids, 0.1)
    points = uniform(0, Purpose.SAMPLE, ids, 0, (sizes.points, 3))
    backends: list[tuple[str, GridBackend, bool]] = [("torch", "torch", False), ("torch, gathering", "torch", True)]
    if what_is_missing(device) is None:
        backends.append(("triton", "triton", False))
    if device.type == "cuda" and find_spec("tinycudann"):
        backends.append(("tinycudann", "tinycudann", False))
    for name, backend, gather in backends:
        grid = HashGrid(sizes.grid, gather, backend)

        def call(grid: HashGrid = grid) -> tuple[Tensor, ...]:
            tables = {name: table.detach().requires_grad_(backward) for name, table in start.items()}
            features = grid.encode(tables, points)
            if not backward:
                return (features,)
            return torch.autograd.grad(features.square().sum(), list(tables.values()))

        yield name, call


def _bundle(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Occupied cells (a ball), origins, directions and jitter of a picture of each particle."""
    ids = torch.arange(sizes.particles, device=device)
    cameras = OrbitSampler(CamerasConfig(distance=(1.5, 1.5))).sample(0, ids, 0, 1, None)
    origins, directions = rays(cameras, sizes.edge, sizes.edge)
    directions = directions.flatten(1, 3)
    axis = (torch.arange(sizes.cells, device=device) + 0.5) / sizes.cells - 0.5
    ball = sum(x.square() for x in torch.meshgrid(axis, axis, axis, indexing="ij"))
    assert isinstance(ball, Tensor), "three axes were summed"
    occupied = (ball < 0.3**2).expand(len(ids), -1, -1, -1)
    jitter = uniform(0, Purpose.RAY_JITTER, ids, 0, (directions.shape[1],))
    return occupied, origins.expand_as(directions), directions, jitter


def _marches(
    sizes: Sizes, occupied: Tensor, origins: Tensor, directions: Tensor, jitter: Tensor
) -> Iterator[tuple[str, Call]]:
    given = (occupied, origins, directions, 0.6, sizes.grid.samples_per_ray, jitter)

    # The number of samples may differ by those whose middle is at the border of a cell: what is compared is their sum.
    def summed(ray: Tensor, starts: Tensor, ends: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            starts.new_zeros(jitter.numel()).index_add(0, ray, value) for value in (ends - starts, ends, starts)
        )

    yield "torch", lambda: summed(*dense_march(*given))
    if what_is_missing(jitter.device) is None:
        from distvsd.render.kernels.march import march

        def call() -> tuple[Tensor, ...]:
            _, ray, _, starts, ends = march(*given)
            return summed(ray, starts, ends)

        yield "triton", call


def dense_march(
    occupied: Tensor, origins: Tensor, directions: Tensor, bound: float, steps: int, jitter: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Ray, start and end of the samples in occupied cells, by a mask over all steps of all rays."""
    starts, ends = sample_intervals(origins, directions, bound, steps, jitter)
    size = occupied.shape[-1]
    middles = origins[:, :, None] + directions[:, :, None] * ((starts + ends) / 2)[..., None]
    cell = ((middles / (2 * bound) + 0.5) * size).clamp(0, size - 1).long()
    owner = torch.arange(len(occupied), device=cell.device)[:, None, None]
    mask = occupied[owner, cell[..., 2], cell[..., 1], cell[..., 0]] & (ends > starts)
    particle, ray, _ = mask.nonzero(as_tuple=True)
    return particle * origins.shape[1] + ray, starts[mask], ends[mask]


def _composites(
    sizes: Sizes, occupied: Tensor, origins: Tensor, directions: Tensor, jitter: Tensor, backward: bool
) -> Iterator[tuple[str, Call]]:
    steps, rays_, device = sizes.grid.samples_per_ray, jitter.numel(), jitter.device
    ray, starts, ends = dense_march(occupied, origins, directions, 0.6, steps, jitter)
    first = torch.searchsorted(ray, torch.arange(rays_, device=device))
    column = torch.arange(len(ray), device=device) - first[ray]
    dense, tinted = (6 * uniform(0, Purpose.SAMPLE, [0], lane, (len(ray), 4))[0].to(device) for lane in (0, 1))

    def padded(values: Tensor) -> Tensor:
        """`[rays, steps, ...]`, zeros behind each ray's samples."""
        return values.new_zeros(rays_, steps, *values.shape[1:]).index_put((ray, column), values)

    def by_torch(density: Tensor, color: Tensor) -> tuple[Tensor, Tensor]:
        out = composite(padded(starts), padded(ends), padded(density), padded(color))
        return out.color, out.opacity

    def by_triton(density: Tensor, color: Tensor) -> tuple[Tensor, Tensor]:
        from distvsd.render.kernels.composite import composite as fused

        return fused(ray, ends - starts, density, color, rays_)[:2]

    def by_nerfacc(density: Tensor, color: Tensor) -> tuple[Tensor, Tensor]:
        weights = nerfacc_packed_weights(ray, starts, ends, density, rays_)
        both = torch.cat((weights[:, None] * color, weights[:, None]), dim=1)
        whole = both.new_zeros(rays_, 4).index_add(0, ray, both)
        return whole[:, :3], whole[:, 3:]

    backends: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {"torch, padded": by_torch}
    if what_is_missing(device) is None:
        backends["triton"] = by_triton
    if device.type == "cuda" and find_spec("nerfacc"):
        backends["nerfacc"] = by_nerfacc
    for name, made in backends.items():

        def call(made: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = made) -> tuple[Tensor, ...]:
            density, color = (
                dense[:, 0].clone().requires_grad_(backward),
                tinted[:, :3].clone().requires_grad_(backward),
            )
            out = made(density, color)
            return torch.autograd.grad(out[0].square().sum() + out[1].sum(), (density, color)) if backward else out

        yield name, call


def render_table(sizes: Sizes, device: torch.device) -> Iterator[str]:
    """A training render of the paper's field, and the same with its backward pass, by the backend of its grid."""
    yield f"| field, {sizes.edge} x {sizes.edge} x {sizes.grid.samples_per_ray} | backend | ms | difference |"
    yield "|---|---|---:|---:|"
    for backward in (False, True):
        name = "render, forward and backward" if backward else "render, forward"
        yield from compared(name, dict(_renders(sizes, device, backward)), device, min(sizes.repeats, 5))


def _renders(sizes: Sizes, device: torch.device, backward: bool) -> Iterator[tuple[str, Call]]:
    ids = torch.arange(1, device=device)
    cameras = OrbitSampler(CamerasConfig(distance=(1.5, 1.5))).sample(0, ids, 0, 1, None)
    backends: list[GridBackend] = ["torch"]
    if what_is_missing(device) is None:
        backends.append("triton")
    for backend in backends:
        config = replace(sizes.grid, bound=0.6)
        particle = NerfParticle(
            config=config,
            learning_rate=lambda step: 0.01,
            network_learning_rate=lambda step: 0.01,
            grid_backend=backend,
            deterministic=False,
        )
        start = particle.init(0, ids)

        def call(particle: NerfParticle = particle, start: dict[str, Tensor] = start) -> tuple[Tensor, ...]:
            parameters = {name: value.detach().requires_grad_(backward) for name, value in start.items()}
            images = particle.render(parameters, cameras, sizes.edge, Keys(0, ids, 0)).images
            if not backward:
                return (images,)
            return torch.autograd.grad(images.square().sum(), list(parameters.values()), allow_unused=True)[:4]

        yield backend, call
