"""Adaptive cameras: where they stand and look, in fields made by hand.

The room: cells of 0.2; inside is |x|, |y| < 0.8 and |z| < 0.6, the wall is one cell thick, and beyond it is free again.
A pillar of 2 x 2 cells stands in it. So 8 x 8 x 6 - 2 x 2 x 6 = 360 cells are free inside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distvsd.cameras import AdaptiveSampler, Cameras, Field, SceneSampler
from distvsd.cameras.adaptive import reachable
from distvsd.config import AdaptiveConfig, CamerasConfig
from distvsd.errors import ConfigError
from distvsd.testing import check_sampler

INSIDE = torch.tensor([0.8, 0.8, 0.6])
CLEARANCE = 0.4
SETTINGS = AdaptiveConfig(bound=1.4, cells=14, optical_depth=0.1, clearance=CLEARANCE)
CONFIG = CamerasConfig(
    kind="adaptive", elevation=(-20.0, 20.0), distance=(0.1, 0.3), fovy=(60.0, 80.0), adaptive=SETTINGS
)
SAMPLER = AdaptiveSampler(CONFIG)
IDS = torch.arange(20)


def within(points: Tensor, half: Tensor) -> Tensor:
    return (points.abs() < half).all(-1)


def room(points: Tensor) -> Tensor:
    pillar = ((points[..., :2] > 0.2) & (points[..., :2] < 0.6)).all(-1)
    wall = within(points, INSIDE + 0.2) & ~within(points, INSIDE)
    return 100.0 * (wall | pillar & within(points, INSIDE))


def solid(points: Tensor) -> Tensor:
    return torch.full_like(points[..., 0], 100.0)


def at(cameras: Cameras) -> Tensor:
    return cameras.extrinsics[..., :3, 3]


def looking(cameras: Cameras) -> Tensor:
    return -cameras.extrinsics[..., :3, 2]


def test_it_conforms_in_a_room_and_stays_out_of_matter() -> None:
    for antithetic in (False, True):
        sampler = AdaptiveSampler(replace(CONFIG, antithetic=antithetic))
        check_sampler(sampler, field_of=lambda ids: room, free_of=0.5, distance=(0.0, 1.3))


def test_free_space_ends_at_the_walls_although_it_is_free_behind_them() -> None:
    free = SAMPLER.free_space(room, IDS[:2])
    assert free.shape == (2, 14, 14, 14) and free.flatten(1).sum(1).tolist() == [360, 360]
    assert free[0, 3, 3, 4] and not free[0, 0, 0, 0] and not free[0, 8, 8, 7]


def test_cameras_keep_to_a_range_of_heights() -> None:
    """Middles of cells are at 0.1, 0.3 and so on: one layer of 60 free cells, from 0.2 to 0.4."""
    sampler = AdaptiveSampler(replace(CONFIG, adaptive=replace(SETTINGS, height=(0.2, 0.4))))
    assert int(sampler.free_space(room, IDS[:1]).sum()) == 60
    height = at(sampler.sample(0, IDS, 0, 10, room))[..., 2]
    assert height.min() >= 0.2 - 1e-6 and height.max() <= 0.4 + 1e-6


def test_a_hole_in_the_wall_as_large_as_a_cell_lets_cameras_out() -> None:
    def open_room(points: Tensor) -> Tensor:
        hole = (points[..., 0] > 0.8) & (points[..., 1:] > 0).all(-1) & (points[..., 1:] < 0.2).all(-1)
        return room(points) * ~hole

    # All but the wall and the pillar: 14^3 cells less 10 x 10 x 8, and the inside, and the hole.
    assert int(SAMPLER.free_space(open_room, IDS[:1]).sum()) == 14**3 - 800 + 360 + 1


def test_no_camera_stands_in_matter_and_none_faces_a_wall_from_nearer_than_the_clearance() -> None:
    cameras = SAMPLER.sample(3, IDS, 5, 40, room)
    position, direction = at(cameras), looking(cameras)
    assert (room(position) == 0).all() and within(position, INSIDE).all()
    to_wall = ((INSIDE * direction.sign() - position) / direction).amin(-1)
    # In the gap between the pillar and the corner no direction may have so much room.
    is_gap = (position[..., :2] > 0.2).all(-1)
    assert to_wall[~is_gap].min() >= CLEARANCE and is_gap.float().mean() < 0.12
    # Points on the way are read half a cell apart, so that no more than a corner of the pillar can be in between.
    ahead = torch.linspace(0, CLEARANCE, 81)[:, None]
    crossed = (room(position[:, :, None] + direction[:, :, None] * ahead) > 0).float().mean(-1) * CLEARANCE
    assert crossed[~is_gap].max() < 0.1
    assert cameras.fovy.rad2deg().min() >= 60 and cameras.fovy.rad2deg().max() <= 80
    assert direction[..., 2].asin().rad2deg().abs().max() <= 20.001


def test_positions_are_in_proportion_to_free_volume() -> None:
    position = at(SAMPLER.sample(0, IDS, 0, 180, room)).flatten(0, 1)
    cell = ((position + 1.4) / 0.2).floor().long()
    counts = torch.zeros(14, 14, 14).index_put(tuple(cell.unbind(-1)), torch.ones(len(cell)), accumulate=True)
    counts = counts[SAMPLER.free_space(room, IDS[:1])[0]]
    assert counts.sum() == 3600  # 10 expected in each of 360 cells
    chi_squared = float(((counts - 10) ** 2 / 10).sum())
    assert abs(chi_squared - 359) < 5 * (2 * 359) ** 0.5
    inside_cell = (position + 1.4) / 0.2 - cell
    torch.testing.assert_close(inside_cell.mean(0), torch.full((3,), 0.5), rtol=0, atol=0.03)
    torch.testing.assert_close(inside_cell.var(0), torch.full((3,), 1 / 12), rtol=0.08, atol=0)


def test_a_camera_falls_back_to_the_middle_of_its_cell_where_the_cell_is_free_only_there() -> None:
    def dotted(points: Tensor) -> Tensor:
        off_middle = ((points + 1.4) / 0.2 % 1 - 0.5).abs().amax(-1)
        return torch.where(off_middle > 0.1, 100.0, 0.0)

    position = at(SAMPLER.sample(0, IDS, 0, 4, dotted))
    assert (dotted(position) == 0).all()


@pytest.mark.parametrize("spoil", [lambda density: density + 100, lambda density: density * torch.nan])
def test_without_free_space_the_cameras_are_those_of_the_fixed_ranges(spoil: Callable[[Tensor], Tensor]) -> None:
    def field(points: Tensor) -> Tensor:
        density = room(points)
        return torch.stack([spoil(row) if i == 1 else row for i, row in enumerate(density)])

    cameras = SAMPLER.sample(0, IDS[:3], 2, 4, field)
    fixed = SceneSampler(CONFIG).sample(0, IDS[:3], 2, 4, None)
    assert torch.equal(cameras.extrinsics[1], fixed.extrinsics[1]) and torch.equal(cameras.fovy[1], fixed.fovy[1])
    others = SAMPLER.sample(0, IDS[:3], 2, 4, room)
    assert torch.equal(cameras.extrinsics[[0, 2]], others.extrinsics[[0, 2]])


def shell(points: Tensor) -> Tensor:
    """A hollow ball: matter from 0.3 to 0.7; the rest of a cube of 1.2 is free, in a wall."""
    radius = points.norm(dim=-1)
    return 100.0 * ((radius > 0.3) & (radius < 0.7) | (points.abs().amax(-1) > 1.2))


@pytest.mark.parametrize(("start", "nearest", "farthest"), [(0.0, 0.0, 0.3), (0.9, 0.7, 2.1)])
def test_the_start_says_which_side_of_an_object_cameras_are_on(start: float, nearest: float, farthest: float) -> None:
    sampler = AdaptiveSampler(replace(CONFIG, adaptive=replace(SETTINGS, start=start)))
    away = at(sampler.sample(0, IDS, 0, 10, shell)).norm(dim=-1)
    assert away.min() >= nearest and away.max() <= farthest


def test_where_the_centre_is_matter_the_nearest_free_cell_is_the_start() -> None:
    def filled(points: Tensor) -> Tensor:
        return torch.maximum(shell(points), 100.0 * (points.norm(dim=-1) < 0.5))

    away = at(SAMPLER.sample(0, IDS, 0, 10, filled)).norm(dim=-1)
    assert away.min() >= 0.7 and away.max() > 1.0


def test_where_no_direction_has_enough_room_the_one_with_most_is_taken() -> None:
    """A corridor one cell wide along x, shorter than the clearance: only its two directions have some room."""

    def corridor(points: Tensor) -> Tensor:
        x, y, z = points.unbind(-1)
        return 100.0 * ~((x.abs() < 0.6) & (y > 0) & (y < 0.2) & (z > 0) & (z < 0.2))

    sampler = AdaptiveSampler(replace(CONFIG, elevation=(-1.0, 1.0), adaptive=replace(SETTINGS, clearance=1.3)))
    cameras = sampler.sample(0, IDS, 0, 10, corridor)
    assert (corridor(at(cameras)) == 0).all()
    along = looking(cameras)[..., 0].abs()
    # Of 32 directions the closest to an axis is some 3 degrees from it; any one of them would be 45 degrees on average.
    assert along.median() > 0.97 and along.mean() > 0.9


def test_pairs_stand_on_one_spot_and_look_in_opposite_directions() -> None:
    sampler = AdaptiveSampler(replace(CONFIG, antithetic=True))
    cameras = sampler.sample(0, IDS, 0, 6, room)
    turn = torch.tensor([-1.0, -1.0, 1.0])
    assert torch.equal(at(cameras)[:, 1::2], at(cameras)[:, ::2])
    assert torch.equal(cameras.extrinsics[:, 1::2, :3, :3], cameras.extrinsics[:, ::2, :3, :3] * turn[:, None])
    assert torch.equal(cameras.fovy[:, 1::2], cameras.fovy[:, ::2])
    to_wall = ((INSIDE * looking(cameras).sign() - at(cameras)) / looking(cameras)).amin(-1)
    roomy = at(cameras).abs().amax(-1) < 0.4  # nearer to a wall, a pair may find no direction that is free both ways
    assert roomy.any() and to_wall[roomy].min() >= CLEARANCE


def test_a_particle_without_a_density_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cameras\.kind"):
        SAMPLER.sample(0, IDS, 0, 1, None)


def test_flooding_goes_around_corners_and_not_across_edges() -> None:
    """Row 0: a path through all of a plane, in a zigzag. Row 1: two cells that share an edge only."""
    free = torch.zeros(2, 9, 9, 9, dtype=torch.bool)
    free[0, ::2, :, 0] = True
    free[0, 1::4, 8, 0] = free[0, 3::4, 0, 0] = True
    free[1, 2, 2, 2] = free[1, 3, 3, 2] = True
    seeds = torch.zeros_like(free)
    seeds[0, 0, 0, 0] = seeds[1, 2, 2, 2] = True
    reached = reachable(seeds, free)
    assert torch.equal(reached[0], free[0]) and int(free[0].sum()) == 5 * 9 + 4
    assert torch.equal(reached[1], seeds[1])
    assert torch.equal(reachable(seeds[:1], free[:1])[0], reached[0])


def test_a_field_is_read_once_for_the_grid_and_few_times_for_the_views() -> None:
    """The cost of a round: 14^3 points, and for each view its place and 32 directions of 4 points."""
    sizes: list[int] = []

    def counted(points: Tensor) -> Tensor:
        sizes.append(points.shape[1])
        return room(points)

    field: Field = counted
    SAMPLER.sample(0, IDS[:2], 0, 3, field)
    assert sizes == [14**3, 3, 3 * 32 * 4]
