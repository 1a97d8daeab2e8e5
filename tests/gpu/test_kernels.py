"""The Triton kernels on CUDA, tinycudann and nerfacc: values and gradients of their plain references there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distvsd.cameras import rays
from distvsd.config import NerfConfig
from distvsd.particles import NerfParticle
from distvsd.render import HashGrid, composite, sample_intervals
from distvsd.render.hashgrid import GridBackend
from distvsd.render.volume import nerfacc_packed_weights
from distvsd.testing import check_particle
from distvsd.vsd.rng import Purpose, uniform
from tests.gpu.drawn import SAMPLER, image_and_gradients

SHAPE = NerfConfig(levels=6, features=2, log2_table_size=12, base_resolution=8, max_resolution=128, init_scale=0.5)
FIELD = replace(SHAPE, samples_per_ray=24, bound=0.6, blob_radius=0.4, init_color=0.5)


@pytest.fixture(autouse=True)
def triton() -> None:
    pytest.importorskip("triton")


def close(ours: Tensor, theirs: Tensor, most: float = 1e-4) -> None:
    """By the relative error of the whole: sums of another order differ in single entries."""
    error = float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-12))
    assert error < most, f"relative error {error:.2g}"


def read_with_gradients(grid: HashGrid, tables: dict[str, Tensor], points: Tensor) -> list[Tensor]:
    leaves = {name: table.clone().requires_grad_() for name, table in tables.items()}
    where = points.clone().requires_grad_()
    features = grid.encode(leaves, where)
    weights = torch.arange(features.numel(), dtype=torch.float32, device=features.device).reshape(features.shape).cos()
    return [features.detach(), *torch.autograd.grad((features * weights).sum(), [*leaves.values(), where])]


@pytest.mark.parametrize("backend", ["triton", "tinycudann"])
@pytest.mark.parametrize("smoothstep", [False, True])
@pytest.mark.parametrize("features", [1, 2, 4])
def test_the_hash_grid_is_that_of_the_reference(
    device: torch.device, backend: GridBackend, smoothstep: bool, features: int
) -> None:
    if backend == "tinycudann":
        _tinycudann()
    config = replace(SHAPE, smoothstep=smoothstep, features=features)
    ids = torch.tensor([4, 0, 9], device=device)
    tables = HashGrid(config).init(0, ids, 1.0)
    points = uniform(0, Purpose.SAMPLE, ids, 0, (5001, 3))
    found, wanted = (
        read_with_gradients(grid, tables, points)
        for grid in (HashGrid(config, backend=backend), HashGrid(config, gather=True))
    )
    # Linear shares jump from cell to cell in their slope, and a point within a rounding of a vertex may be in either.
    for ours, theirs in zip(found[:-1], wanted[:-1], strict=True):
        close(ours, theirs)
    close(found[-1], wanted[-1], 1e-4 if smoothstep else 5e-2)


def _tinycudann() -> None:
    try:
        import tinycudann  # noqa: F401
    except (ImportError, OSError) as error:
        pytest.skip(f"tinycudann cannot be imported: {error}")


def test_the_hash_grid_takes_no_points_and_bad_points(device: torch.device) -> None:
    grid = HashGrid(SHAPE, backend="triton")
    tables = grid.init(0, torch.tensor([1, 2], device=device), 1.0)
    assert grid.encode(tables, torch.zeros(2, 0, 3, device=device)).shape == (2, 12, 0)
    points = torch.rand(2, 9, 3, device=device)
    clean = grid.encode(tables, points)
    points[1, 4, 2] = torch.nan
    found = grid.encode(tables, points)
    assert bool(found[1, :, 4].isnan().all()) and torch.equal(found[0], clean[0])


def test_a_field_draws_as_with_plain_torch(device: torch.device) -> None:
    ours, theirs = (image_and_gradients(field(backend), device) for backend in ("triton", "torch"))
    assert torch.allclose(ours[0], theirs[0], atol=2e-4)
    for name, expected in theirs[1].items():
        close(ours[1][name], expected, 2e-3)


def test_a_field_with_the_kernels_conforms(device: torch.device) -> None:
    check_particle(field("triton"), device=device)


def field(backend: Any) -> NerfParticle:
    return NerfParticle(
        config=FIELD,
        learning_rate=lambda step: 0.01,
        network_learning_rate=lambda step: 0.01,
        grid_backend=backend,
        deterministic=False,
    )


def marched(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cells, origins, directions and jitter of three particles with two views of 24 pixels."""
    ids = torch.tensor([4, 0, 9], device=device)
    origins, directions = rays(SAMPLER.sample(5, ids, 3, 2, None), 24, 24)
    origins = origins[:, :, None, None].expand_as(directions).flatten(1, 3)
    directions = directions.flatten(1, 3)
    cells = uniform(1, Purpose.SAMPLE, ids, 0, (8, 8, 8)) < 0.3
    return cells, origins, directions, uniform(1, Purpose.RAY_JITTER, ids, 0, (directions.shape[1],))


def test_marching_keeps_the_dense_steps_in_occupied_cells(device: torch.device) -> None:
    from distvsd.render.kernels.march import march

    cells, origins, directions, jitter = marched(device)
    ends, ray, step, starts, stops = march(cells, origins, directions, 0.6, 32, jitter)
    dense_starts, dense_ends = sample_intervals(origins, directions, 0.6, 32, jitter)
    middles = origins[:, :, None] + directions[:, :, None] * ((dense_starts + dense_ends) / 2)[..., None]
    cell = ((middles / 1.2 + 0.5) * 8).clamp(0, 7).long()
    owner = torch.arange(3, device=device)[:, None, None]
    mask = cells[owner, cell[..., 2], cell[..., 1], cell[..., 0]] & (dense_ends > dense_starts)
    kept = torch.zeros_like(mask)
    kept.view(-1)[ray * 32 + step] = True
    # A middle within a rounding of a cell's border may be in either cell.
    assert int((kept != mask).sum()) <= 1e-3 * mask.numel()
    assert torch.equal(kept.flatten(1).sum(1).cumsum(0), ends) and bool((ray.diff() >= 0).all())
    where = ray * 32 + step
    torch.testing.assert_close(starts, dense_starts.flatten()[where], rtol=0, atol=1e-5)
    torch.testing.assert_close(stops, dense_ends.flatten()[where], rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "nerfacc"])
def test_packed_compositing_is_the_dense_one(device: torch.device, backend: str) -> None:
    """Every step is a sample here, so that the dense function is the reference."""
    from distvsd.render.kernels.composite import composite as fused

    if backend == "nerfacc":
        pytest.importorskip("nerfacc")
    _, origins, directions, jitter = marched(device)
    starts, ends = (value.flatten(0, 1) for value in sample_intervals(origins, directions, 0.6, 50, jitter))
    count = len(starts)
    density = 8 * uniform(1, Purpose.SAMPLE, [0], 2, (count, 50))[0].to(device)
    color = uniform(1, Purpose.SAMPLE, [0], 3, (count, 50, 3))[0].to(device)
    ray = torch.arange(count, device=device).repeat_interleave(50)
    found: list[list[Tensor]] = []
    for which in ("torch", backend):
        dense, tinted = density.clone().requires_grad_(), color.clone().requires_grad_()
        if which == "torch":
            out = composite(starts, ends, dense, tinted)
            weights, light = out.weights.flatten(), out.color
        elif which == "triton":
            light, _, weights = fused(ray, (ends - starts).flatten(), dense.flatten(), tinted.flatten(0, 1), count)
        else:
            weights = nerfacc_packed_weights(ray, starts.flatten(), ends.flatten(), dense.flatten(), count)
            light = color.new_zeros(count, 3).index_add(0, ray, weights[:, None] * tinted.flatten(0, 1))
        total = light.square().sum() + (weights * ray.float().cos()).sum()
        found.append([light.detach(), weights.detach(), *torch.autograd.grad(total, (dense, tinted))])
    for ours, theirs in zip(found[1], found[0], strict=True):
        close(ours, theirs)
