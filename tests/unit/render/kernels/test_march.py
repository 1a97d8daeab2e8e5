"""Marching through occupied cells: what the dense steps keep, worked out with plain torch here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distvsd.render.kernels.march import BLOCK, march
from distvsd.render.volume import sample_intervals


def bundle(particles: int, rays: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Origins on a sphere of radius 2, directions towards somewhere near the centre, jitter."""
    generator = torch.Generator().manual_seed(seed)
    origins = torch.nn.functional.normalize(torch.randn(particles, rays, 3, generator=generator), dim=-1) * 2
    aims = (torch.rand(particles, rays, 3, generator=generator) - 0.5) * 1.5
    directions = torch.nn.functional.normalize(aims - origins, dim=-1)
    return origins, directions, torch.rand(particles, rays, generator=generator)


def some_cells(particles: int, size: int, share: float, seed: int = 1) -> Tensor:
    return torch.rand(particles, size, size, size, generator=torch.Generator().manual_seed(seed)) < share


def kept(
    occupied: Tensor, origins: Tensor, directions: Tensor, bound: float, steps: int, jitter: Tensor
) -> list[Tensor]:
    """Every interval of every ray, and of these the ones in occupied cells, chosen by a mask; in float64."""
    starts, ends = sample_intervals(origins, directions, bound, steps, jitter)
    middles = ((starts + ends) / 2).double()
    size = occupied.shape[-1]
    points = origins.double()[:, :, None] + directions.double()[:, :, None] * middles[..., None]
    cell = ((points / (2 * bound) + 0.5) * size).floor().long().clamp(0, size - 1)
    owner = torch.arange(len(occupied))[:, None, None]
    mask = occupied[owner, cell[..., 2], cell[..., 1], cell[..., 0]] & (ends > starts)
    particle, ray, step = mask.nonzero(as_tuple=True)
    return [mask.sum((1, 2)).cumsum(0), particle * origins.shape[1] + ray, step, starts[mask], ends[mask]]


@pytest.mark.parametrize("rays", [1, 37, BLOCK + 3])
def test_the_samples_are_those_of_the_dense_steps_in_occupied_cells(rays: int) -> None:
    given = (some_cells(3, 5, 0.3), *bundle(3, rays))
    cells, origins, directions, jitter = given
    found = march(cells, origins, directions, 0.6, 24, jitter)
    wanted = kept(cells, origins, directions, 0.6, 24, jitter)
    for ours, theirs in zip(found[:3], wanted[:3], strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(found[3:], wanted[3:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_with_every_cell_occupied_it_is_the_dense_rays_without_those_that_miss() -> None:
    origins, directions, jitter = bundle(2, 20)
    starts, ends = sample_intervals(origins, directions, 0.5, 16, jitter)
    _, ray, step, found_starts, found_ends = march(
        torch.ones(2, 4, 4, 4, dtype=torch.bool), origins, directions, 0.5, 16, jitter
    )
    hit = ends > starts
    assert 0 < int(hit.sum()) < hit.numel()
    torch.testing.assert_close(found_starts, starts[hit], rtol=0, atol=1e-6)
    torch.testing.assert_close(found_ends, ends[hit], rtol=0, atol=1e-6)
    assert torch.equal(ray * 16 + step, hit.flatten().nonzero().squeeze(1))


def test_one_cell_is_met_where_it_is() -> None:
    """A ray along x through the middle of cell (x 2, y 1, z 0) of 4, at steps of half a cell."""
    occupied = torch.zeros(1, 4, 4, 4, dtype=torch.bool)
    occupied[0, 0, 1, 2] = True
    origins, directions = torch.tensor([[[-2.0, -0.25, -0.75]]]), torch.tensor([[[1.0, 0, 0]]])
    ends, ray, step, starts, stops = march(occupied, origins, directions, 1.0, 8, torch.tensor([[0.5]]))
    # The cell is at x from 0 to 0.5, and the camera at -2.
    assert (ends.tolist(), ray.tolist(), step.tolist()) == ([2], [0, 0], [4, 5])
    torch.testing.assert_close(starts, torch.tensor([2.0, 2.25]))
    torch.testing.assert_close(stops, torch.tensor([2.25, 2.5]))


@pytest.mark.parametrize(("particles", "rays"), [(2, 9), (2, 0), (0, 9)])
def test_nothing_occupied_or_no_rays_give_no_samples(particles: int, rays: int) -> None:
    cells = torch.zeros(particles, 4, 4, 4, dtype=torch.bool)
    ends, *samples = march(cells, *bundle(particles, rays)[:2], 0.5, 8, bundle(particles, rays)[2])
    assert ends.tolist() == [0] * particles and all(len(value) == 0 for value in samples)


def test_rays_that_miss_or_look_away_are_left_out() -> None:
    origins = torch.tensor([[[2.0, 2, 0], [2, 0, 0], [2, 0, 0]]])
    directions = torch.tensor([[[-1.0, 0, 0], [1, 0, 0], [-1, 0, 0]]])
    occupied = torch.ones(1, 4, 4, 4, dtype=torch.bool)
    _, ray, *_ = march(occupied, origins, directions, 0.5, 4, torch.full((1, 3), 0.5))
    assert ray.tolist() == [2, 2, 2, 2]


def test_several_particles_are_one_at_a_time() -> None:
    cells, (origins, directions, jitter) = some_cells(3, 4, 0.5), bundle(3, 11)
    ends, ray, *rest = march(cells, origins, directions, 0.6, 12, jitter)
    first = 0
    for row, last in enumerate(ends.tolist()):
        one = slice(row, row + 1)
        alone = march(cells[one], origins[one], directions[one], 0.6, 12, jitter[one])
        assert torch.equal(ray[first:last] - row * 11, alone[1])
        assert all(torch.equal(value[first:last], other) for value, other in zip(rest, alone[2:], strict=True))
        first = last
