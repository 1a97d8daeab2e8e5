"""Rays through occupied cells: which samples are kept, and that packed rendering is dense rendering of matter."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distvsd.render.packed import Packed, composite_packed, march
from distvsd.render.volume import composite, sample_intervals

BOUND = 1.0


def drawn(shape, seed=0, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some_rays(particles=2, rays=12, seed=0, dtype=torch.float64):
    """From a sphere around the cube to points in it, some of which miss it."""
    origins = torch.nn.functional.normalize(drawn((particles, rays, 3), seed, dtype) - 0.5, dim=-1) * 2.5
    targets = (drawn((particles, rays, 3), seed + 1, dtype) - 0.5) * 3
    return origins, torch.nn.functional.normalize(targets - origins, dim=-1), drawn((particles, rays), seed + 2, dtype)


def points_of(packed, origins, directions):
    middles = ((packed.starts + packed.ends) / 2)[:, None]
    return origins.flatten(0, 1)[packed.ray] + directions.flatten(0, 1)[packed.ray] * middles


def test_a_ray_along_x_stops_where_a_hand_says():
    """A ray along +x at y = z = 0.25 from x = -2, 8 steps of 0.25 over [-1, 1], no shift: middles at -0.875 to 0.875.
    Of four cells of 0.5 along x the second, [-0.5, 0], and the fourth, [0.5, 1], are occupied: they hold the
    middles -0.375, -0.125, 0.625 and 0.875, steps 2, 3, 6, 7. y and z are in the third cell."""
    occupied = torch.zeros(1, 4, 4, 4, dtype=torch.bool)
    occupied[0, 2, 2, 1] = occupied[0, 2, 2, 3] = True
    origins = torch.tensor([[[-2.0, 0.25, 0.25]]])
    packed = march(occupied, origins, torch.tensor([[[1.0, 0, 0]]]), BOUND, 8, torch.full((1, 1), 0.5))
    assert packed.step.tolist() == [2, 3, 6, 7] and packed.ray.tolist() == [0] * 4
    torch.testing.assert_close(packed.starts, torch.tensor([1.5, 1.75, 2.5, 2.75]))
    torch.testing.assert_close(packed.ends, torch.tensor([1.75, 2.0, 2.75, 3.0]))
    assert packed.particle_ends.tolist() == [4] and packed.num_steps == 8


@pytest.mark.parametrize(("direction", "cell"), [((0.0, 1, 0), (2, 1, 2)), ((0.0, 0, 1), (1, 2, 2))])
def test_the_other_axes_of_the_grid_are_y_and_z(direction, cell):
    """The same along y and along z: one cell, [-0.5, 0] on that axis, holds two middles."""
    occupied = torch.zeros(1, 4, 4, 4, dtype=torch.bool)
    occupied[(0, *cell)] = True
    along = torch.tensor([[direction]])
    origins = torch.where(along > 0, -2.0, 0.25)
    packed = march(occupied, origins, along, BOUND, 8, torch.full((1, 1), 0.5))
    assert packed.step.tolist() == [2, 3]


def test_particles_have_grids_of_their_own_and_samples_are_in_order():
    occupied = torch.zeros(3, 2, 2, 2, dtype=torch.bool)
    occupied[1], occupied[2, ..., 1] = True, True
    origins = torch.tensor([-2.0, 0.25, 0.25]).expand(3, 2, 3)
    along = torch.tensor([1.0, 0, 0]).expand(3, 2, 3)
    packed = march(occupied, origins, along, BOUND, 4, torch.full((3, 2), 0.5))
    assert packed.particle_ends.tolist() == [0, 8, 12]
    assert packed.ray.tolist() == [2] * 4 + [3] * 4 + [4] * 2 + [5] * 2
    assert packed.step.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 2, 3, 2, 3]


def test_with_every_cell_occupied_all_steps_of_rays_that_hit_the_cube_are_kept():
    origins, directions, jitter = some_rays()
    packed = march(torch.ones(2, 3, 3, 3, dtype=torch.bool), origins, directions, BOUND, 6, jitter)
    starts, ends = sample_intervals(origins, directions, BOUND, 6, jitter)
    kept = (ends > starts).flatten()
    assert 0 < int(kept.sum()) < kept.numel()
    assert torch.equal(packed.places, kept.nonzero().squeeze(1))
    assert torch.equal(packed.starts, starts.flatten()[kept]) and torch.equal(packed.ends, ends.flatten()[kept])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 7), st.floats(0, 1))
def test_a_sample_is_kept_if_and_only_if_its_middle_is_in_an_occupied_cell(seed, steps, cells, share):
    """The reference looks every middle up by itself. Middles within rounding of a wall may go either way."""
    origins, directions, jitter = some_rays(seed=seed)
    occupied = drawn((2, cells, cells, cells), seed + 3) < share
    packed = march(occupied, origins, directions, BOUND, steps, jitter)
    starts, ends = sample_intervals(origins, directions, BOUND, steps, jitter)
    points = origins[:, :, None] + directions[:, :, None] * ((starts + ends) / 2)[..., None]
    position = (points + BOUND) / (2 * BOUND) * cells
    at_wall = ((position - position.round()).abs() < 1e-9).any(-1)
    x, y, z = position.floor().long().clamp(0, cells - 1).unbind(-1)
    expected = occupied[torch.arange(2)[:, None, None], z, y, x] & (ends > starts)
    found = torch.zeros(expected.numel(), dtype=torch.bool)
    found[packed.places] = True
    assert bool((found.view_as(expected) == expected)[~at_wall].all())
    assert bool((packed.places.diff() > 0).all()) and packed.particle_ends[-1] == len(packed.ray)


def field(points):
    """A density and colours that are smooth in the points `[..., 3]`."""
    return 2 + torch.sin(3 * points).sum(-1), torch.sigmoid(points * 2)


def test_the_packed_picture_of_a_full_cube_is_the_dense_one():
    origins, directions, jitter = some_rays()
    starts, ends = sample_intervals(origins, directions, BOUND, 10, jitter)
    points = origins[:, :, None] + directions[:, :, None] * ((starts + ends) / 2)[..., None]
    dense = composite(starts, ends, *field(points))
    packed = march(torch.ones(2, 2, 2, 2, dtype=torch.bool), origins, directions, BOUND, 10, jitter)
    out = composite_packed(packed, *field(points_of(packed, origins, directions)), 24)
    for ours, theirs in ((out.color, dense.color), (out.opacity, dense.opacity), (out.weights, dense.weights)):
        torch.testing.assert_close(ours, theirs.flatten(0, 1), rtol=0, atol=1e-13)


def test_empty_space_that_is_left_out_changes_no_picture():
    """A ball of density 5 in the middle of exactly nothing; only cells that it touches are occupied."""
    cells, radius = 6, 0.6
    origins, directions, jitter = some_rays(rays=40)
    starts, ends = sample_intervals(origins, directions, BOUND, 30, jitter)
    points = origins[:, :, None] + directions[:, :, None] * ((starts + ends) / 2)[..., None]

    def ball(points):
        return 5.0 * (points.norm(dim=-1) < radius), torch.sigmoid(points)

    low = torch.arange(cells, dtype=torch.float64) * (2 * BOUND / cells) - BOUND
    nearest = torch.zeros(cells, dtype=torch.float64).maximum(low).maximum(-(low + 2 * BOUND / cells))
    distance = (nearest[:, None, None] ** 2 + nearest[:, None] ** 2 + nearest**2).sqrt()
    occupied = (distance < radius).expand(2, -1, -1, -1)
    packed = march(occupied, origins, directions, BOUND, 30, jitter)
    assert 0 < len(packed.ray) < 0.7 * int((ends > starts).sum())
    out, dense = composite_packed(packed, *ball(points_of(packed, origins, directions)), 80), None
    dense = composite(starts, ends, *ball(points))
    torch.testing.assert_close(out.color, dense.color.flatten(0, 1), rtol=0, atol=1e-13)
    torch.testing.assert_close(out.opacity, dense.opacity.flatten(0, 1), rtol=0, atol=1e-13)


def three_rays():
    """Samples on the first and on the last of three rays of one particle: two, and three."""
    starts = torch.tensor([0.0, 1.0, 0.0, 0.5, 2.0], dtype=torch.float64)
    return Packed(
        torch.tensor([5]),
        torch.tensor([0, 0, 2, 2, 2]),
        torch.tensor([0, 2, 0, 1, 4]),
        starts,
        starts + 0.5,
        5,
    )


def test_compositing_by_hand():
    """Density log 4 over 0.5 stops half of the light: weights 1/2, 1/4, 1/8 along a ray; a ray without samples is
    clear."""
    density, color = torch.full((5,), math.log(4), dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    out = composite_packed(three_rays(), density, color[[0, 1, 0, 1, 2]], 3)
    expected = [[1 / 2, 1 / 4, 0], [0, 0, 0], [1 / 2, 1 / 4, 1 / 8]]
    torch.testing.assert_close(out.color, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(out.opacity[:, 0], torch.tensor([3 / 4, 0, 7 / 8], dtype=torch.float64))
    torch.testing.assert_close(out.of_samples, torch.tensor([1 / 2, 1 / 4, 1 / 2, 1 / 4, 1 / 8], dtype=torch.float64))
    assert out.weights.shape == (3, 5) and out.weights[2, 4] == out.of_samples[4] and out.weights[1].eq(0).all()


def test_gradients_agree_with_finite_differences():
    density, color = drawn((5,), 4).requires_grad_(), drawn((5, 3), 5).requires_grad_()

    def of(density, color):
        out = composite_packed(three_rays(), density, color, 3)
        return out.color, out.opacity, out.of_samples, out.weights

    assert torch.autograd.gradcheck(of, (density, color))


def test_a_nan_on_one_ray_stays_on_that_ray():
    density = torch.tensor([1.0, math.nan, 1, 2, 3], dtype=torch.float64, requires_grad=True)
    out = composite_packed(three_rays(), density, torch.ones(5, 3, dtype=torch.float64), 3)
    assert out.color[0].isnan().all() and out.color[1:].isfinite().all()
    out.color.sum().backward()
    assert density.grad[2:].isfinite().all()


def test_nothing_at_all_is_a_clear_picture():
    origins, directions, jitter = some_rays()
    packed = march(torch.zeros(2, 2, 2, 2, dtype=torch.bool), origins, directions, BOUND, 4, jitter)
    assert packed.particle_ends.tolist() == [0, 0]
    out = composite_packed(packed, jitter.new_zeros(0), jitter.new_zeros(0, 3), 24)
    assert out.color.shape == (24, 3) and not out.color.any() and not out.opacity.any()
    assert [batch.spread(jitter.new_zeros(0, 3)).shape[1:] for batch in packed.batches()] == [(0, 3)] * 2


@pytest.mark.parametrize("threads", [1, 2, 5])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_batches_hold_every_sample_once_in_the_row_of_its_particle(monkeypatch, threads, counts):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    ends = torch.tensor(counts).cumsum(0)
    total = int(ends[-1])
    owner = torch.repeat_interleave(torch.tensor(counts))
    packed = Packed(ends, owner, owner, owner.double(), owner.double(), 1)
    values = drawn((total, 2), 6)
    batches = packed.batches()
    assert sorted(torch.cat([batch.samples for batch in batches]).tolist()) == list(range(total))
    assert sorted(particle for batch in batches for particle in batch.particles) == list(range(len(counts)))
    for batch in batches:
        assert len(batch.particles) == batch.number <= threads
        spread = batch.spread(values[batch.samples])
        assert torch.equal(batch.take(spread), values[batch.samples])
        for row, particle in zip(spread, batch.particles, strict=True):
            assert torch.equal(row[: counts[particle]], values[owner == particle])
            assert not row[counts[particle] :].any()
