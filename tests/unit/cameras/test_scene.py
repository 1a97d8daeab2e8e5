"""Cameras inside a scene at fixed ranges, and pairs of opposite views."""

from __future__ import annotations

import pytest
import torch

from distvsd.cameras import CameraSampler, OrbitSampler, SceneSampler, look_along, look_at_origin
from distvsd.config import CamerasConfig, Config
from distvsd.run.parts import make_cameras
from distvsd.testing import check_sampler

ROOM = CamerasConfig(kind="scene", elevation=(-20.0, 20.0), distance=(0.0, 0.3), fovy=(60.0, 80.0))
PAPER = CamerasConfig(kind="scene", distance=(0.1, 2.3))
TURN = torch.tensor([-1.0, -1.0, 1.0, 1.0])[:, None]


@pytest.mark.parametrize("config", [ROOM, PAPER])
@pytest.mark.parametrize("antithetic", [False, True])
def test_it_conforms(config: CamerasConfig, antithetic: bool) -> None:
    from dataclasses import replace

    check_sampler(SceneSampler(replace(config, antithetic=antithetic)), distance=config.distance)


def test_cameras_are_inside_and_look_past_the_centre_at_the_far_wall() -> None:
    cameras = SceneSampler(ROOM).sample(0, torch.arange(200), 0, 2, None)
    position, direction = cameras.extrinsics[..., :3, 3], -cameras.extrinsics[..., :3, 2]
    assert position.norm(dim=-1).max() <= 0.3
    # A step of its distance along its view takes a camera to the centre.
    passed = position + direction * position.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(passed, torch.zeros_like(passed), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["scene", "adaptive"])
def test_inspection_is_from_the_centre_level_and_evenly_around(kind: str) -> None:
    sampler = make_cameras(CamerasConfig(kind=kind, fovy=(60.0, 80.0)))  # type: ignore[arg-type]
    cameras = sampler.inspection(4)
    assert torch.equal(cameras.extrinsics[0, :, :3, 3], torch.zeros(4, 3))
    expected = torch.tensor([[-1.0, 0, 0], [0, -1, 0], [1, 0, 0], [0, 1, 0]])
    torch.testing.assert_close(-cameras.extrinsics[0, :, :3, 2], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(cameras.extrinsics[0, :, :3, 1], torch.tensor([[0.0, 0, 1]]).expand(4, 3))
    torch.testing.assert_close(cameras.fovy.rad2deg(), torch.full((1, 4), 70.0))


@pytest.mark.parametrize(
    "sampler", [OrbitSampler(CamerasConfig(antithetic=True)), SceneSampler(CamerasConfig(antithetic=True))]
)
def test_pairs_are_exactly_turned_by_half_a_turn_about_the_vertical_axis(sampler: CameraSampler) -> None:
    cameras = sampler.sample(0, torch.arange(30), 0, 6, None)
    first, second = cameras[:, ::2], cameras[:, 1::2]
    assert torch.equal(second.extrinsics, first.extrinsics * TURN)
    assert torch.equal(second.fovy, first.fovy) and torch.equal(second.elevation, first.elevation)
    apart = (second.azimuth - first.azimuth).abs().rad2deg()
    torch.testing.assert_close(apart, torch.full_like(apart, 180.0))
    assert second.azimuth.abs().max() <= torch.pi + 1e-6
    # Three different pairs, and an odd number of views is one of them less a half.
    assert len({float(value) for value in first.azimuth[0]}) == 3
    assert torch.equal(sampler.sample(0, torch.arange(30), 0, 5, None).extrinsics, cameras[:, :5].extrinsics)


def test_a_camera_anywhere_looks_as_the_one_around_the_origin_does() -> None:
    angles = torch.tensor([0.3, -0.2]), torch.tensor([1.0, -2.5])
    around = look_at_origin(*angles, torch.tensor([2.0, 3.0]), torch.tensor([0.8, 0.9]))
    same = look_along(around.extrinsics[:, :3, 3], *angles, around.fovy)
    for name in ("extrinsics", "fovy", "elevation", "azimuth"):
        torch.testing.assert_close(getattr(same, name), getattr(around, name))
    moved = look_along(torch.tensor([[0.0, 0, 0], [0, 0, 1.0]]), *angles, around.fovy)
    assert torch.equal(moved.extrinsics[:, :3, :3], around.extrinsics[:, :3, :3])
    torch.testing.assert_close(moved.elevation, torch.tensor([0.0, torch.pi / 2]))


def test_the_default_is_an_orbit() -> None:
    assert isinstance(make_cameras(Config().cameras), OrbitSampler)
