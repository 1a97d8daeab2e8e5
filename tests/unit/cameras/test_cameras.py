"""Cameras: their poses, their rays, and draws that depend on the particle and the round only."""

import math

import pytest
import torch

from distvsd.cameras import OrbitSampler, look_at_origin, rays
from distvsd.config import CamerasConfig

SAMPLER = OrbitSampler(CamerasConfig(elevation=(-10.0, 45.0), distance=(1.0, 1.5), fovy=(40.0, 70.0)))


def camera(elevation_deg, azimuth_deg, distance=2.0, fovy_deg=90.0):
    values = [math.radians(elevation_deg), math.radians(azimuth_deg), distance, math.radians(fovy_deg)]
    return look_at_origin(*(torch.tensor(value, dtype=torch.float64) for value in values))


@pytest.mark.parametrize(
    ("elevation", "azimuth", "position"),
    [(0, 0, (2, 0, 0)), (0, 90, (0, 2, 0)), (0, 180, (-2, 0, 0)), (30, 0, (math.sqrt(3), 0, 1))],
)
def test_the_front_is_plus_x_and_elevation_goes_up(elevation, azimuth, position):
    matrix = camera(elevation, azimuth).extrinsics
    torch.testing.assert_close(matrix[:3, 3], torch.tensor(position, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_pose_is_a_rotation_that_looks_at_the_origin():
    cameras = SAMPLER.sample(0, torch.arange(50), 3, 4, None)
    rotation = cameras.extrinsics[..., :3, :3]
    identity = torch.eye(3).expand_as(rotation)
    torch.testing.assert_close(rotation @ rotation.transpose(-1, -2), identity, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(50, 4), rtol=0, atol=1e-5)
    position = cameras.extrinsics[..., :3, 3]
    towards = -position / position.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(-rotation[..., 2], towards, rtol=0, atol=1e-5)


def test_rays_of_a_right_angle_leave_through_the_corners_of_a_square():
    # fovy 90 degrees: the top of the image is one unit up at one unit of depth; with 2 x 2 pixels centres are at +-0.5.
    origins, directions = rays(camera(0, 0), 2, 2)
    torch.testing.assert_close(origins, torch.tensor([2.0, 0, 0], dtype=torch.float64), rtol=0, atol=1e-12)
    # Seen from +x looking back, the camera's right is +y; row 0 is up.
    expected = torch.tensor([-1.0, -0.5, 0.5], dtype=torch.float64) / math.sqrt(1.5)
    torch.testing.assert_close(directions[0, 0], expected, rtol=0, atol=1e-12)


def test_samples_stay_in_their_ranges_and_fill_them():
    cameras = SAMPLER.sample(0, torch.arange(2000), 0, 1, None)
    distance = cameras.extrinsics[..., :3, 3].norm(dim=-1)
    for values, low, high in (
        (cameras.elevation.rad2deg(), -10, 45),
        (cameras.azimuth.rad2deg(), -180, 180),
        (cameras.fovy.rad2deg(), 40, 70),
        (distance, 1.0, 1.5),
    ):
        span = high - low
        assert low - 1e-3 <= values.min() <= low + 0.02 * span
        assert high + 1e-3 >= values.max() >= high - 0.02 * span
        assert abs(values.mean() - (low + high) / 2) < 0.03 * span


def test_cameras_belong_to_the_particle_and_the_round():
    together = SAMPLER.sample(9, torch.tensor([3, 8, 1]), 4, 2, None)
    alone = SAMPLER.sample(9, torch.tensor([8]), 4, 2, None)
    assert torch.equal(together.extrinsics[1], alone.extrinsics[0])
    assert not torch.equal(SAMPLER.sample(9, torch.tensor([8]), 5, 2, None).extrinsics, alone.extrinsics)


def test_inspection_walks_once_around_from_the_front_at_the_middle_of_the_ranges():
    cameras = SAMPLER.inspection(4)
    torch.testing.assert_close(cameras.azimuth.rad2deg(), torch.tensor([[0.0, 90.0, 180.0, 270.0]]))
    torch.testing.assert_close(cameras.elevation.rad2deg(), torch.full((1, 4), 15.0))
    torch.testing.assert_close(cameras.fovy.rad2deg(), torch.full((1, 4), 55.0))
    torch.testing.assert_close(cameras.extrinsics[..., :3, 3].norm(dim=-1), torch.full((1, 4), 1.25))


def test_flattening_keeps_the_order_of_particles_and_then_of_views():
    cameras = SAMPLER.sample(0, torch.arange(3), 0, 2, None)
    flat = cameras.flatten()
    assert flat.shape == (6,)
    assert torch.equal(flat.extrinsics[3], cameras.extrinsics[1, 1]) and flat.azimuth[3] == cameras.azimuth[1, 1]
