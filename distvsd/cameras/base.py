"""The camera type, what a sampler of cameras must offer, and the rays that leave a camera.

World: right-handed, z up. Camera: OpenGL, looks along its own -z with +y up (the convention of NeRF and nvdiffrast).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# The density of P particles: world points [P, N, 3] to density [P, N] per world unit, row i of particle i.
Field = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Cameras:
    """A batch of pinhole cameras; every field shares the leading shape `[...]`, floating point, one device.

    extrinsics: `[..., 4, 4]` camera-to-world. fovy: `[...]` vertical field of view, radians.
    elevation, azimuth: `[...]` radians, of the camera as seen from the origin; azimuth 0 is the +x axis ("front").
    """

    extrinsics: Tensor
    fovy: Tensor
    elevation: Tensor
    azimuth: Tensor

    def __getitem__(self, index: object) -> Cameras:
        return Cameras(self.extrinsics[index], self.fovy[index], self.elevation[index], self.azimuth[index])  # type: ignore[index]

    @property
    def shape(self) -> torch.Size:
        return self.fovy.shape

    def flatten(self) -> Cameras:
        """The same cameras with one leading dimension."""
        return Cameras(
            self.extrinsics.reshape(-1, 4, 4),
            self.fovy.reshape(-1),
            self.elevation.reshape(-1),
            self.azimuth.reshape(-1),
        )

    def to(self, device: torch.device | str) -> Cameras:
        return Cameras(
            self.extrinsics.to(device), self.fovy.to(device), self.elevation.to(device), self.azimuth.to(device)
        )


class CameraSampler(Protocol):
    """Where cameras come from. Local, without gradients; communicates nothing."""

    def sample(self, seed: int, ids: Tensor, step: int, views: int, field: Field | None) -> Cameras:
        """Training cameras `[P, views]` of particles `ids` `[P]`, float32, on the device of `ids`.

        Keyed by (seed, particle, step): row i depends on these, on ids[i] and on row i of the field only, so that the
        cameras are the same for every world size and after a resume. field: the particles' density, None where they
        have no volume; a sampler that needs one raises ConfigError then.
        """
        ...

    def inspection(self, views: int) -> Cameras:
        """Fixed cameras `[1, views]`, on the CPU, from which evaluation and pictures look at every particle."""
        ...


def look_at_origin(elevation: Tensor, azimuth: Tensor, distance: Tensor, fovy: Tensor) -> Cameras:
    """Cameras on spheres around the origin that look at it; all arguments `[...]`, angles in radians, distance in
    world units.

    Elevation must stay inside (-pi/2, pi/2): at the poles the up direction is undefined. At distance 0 a camera keeps
    the direction in which it looks.
    """
    ones = torch.ones_like(azimuth)
    rotation = _rotation(elevation, azimuth)
    position = rotation[..., 2] * distance[..., None]
    return Cameras(_pose(rotation, position), fovy * ones, elevation * ones, azimuth * ones)


def look_along(position: Tensor, elevation: Tensor, azimuth: Tensor, fovy: Tensor) -> Cameras:
    """Cameras at `position` `[..., 3]` that look as those of `look_at_origin` at this elevation and azimuth do: down
    by the elevation, away from the azimuth. Angles `[...]` in radians."""
    x, y, z = position.unbind(-1)
    height = (z / position.norm(dim=-1).clamp_min(1e-12)).clamp(-1, 1).asin()
    return Cameras(_pose(_rotation(elevation, azimuth), position), fovy, height, torch.atan2(y, x))


def _rotation(elevation: Tensor, azimuth: Tensor) -> Tensor:
    """Right, up and backward `[..., 3, 3]`, as columns."""
    backward = torch.stack(
        (
            elevation.cos() * azimuth.cos(),
            elevation.cos() * azimuth.sin(),
            elevation.sin(),
        ),
        dim=-1,
    )
    right = torch.stack((-azimuth.sin(), azimuth.cos(), torch.zeros_like(azimuth)), dim=-1)
    return torch.stack((right, torch.linalg.cross(backward, right), backward), dim=-1)


def _pose(rotation: Tensor, position: Tensor) -> Tensor:
    top = torch.cat((rotation, position[..., None]), dim=-1)
    bottom = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=top.dtype, device=top.device).expand(*top.shape[:-2], 1, 4)
    return torch.cat((top, bottom), dim=-2)


def with_opposites(cameras: Cameras) -> Cameras:
    """`[P, 2 V]`: each of the cameras `[P, V]`, followed by itself turned by 180 degrees about the vertical axis of the
    world. Exact: signs of coordinates change, and nothing is rounded."""
    turn = cameras.extrinsics.new_tensor([-1.0, -1.0, 1.0, 1.0])[:, None]
    azimuth = torch.where(cameras.azimuth > 0, cameras.azimuth - math.pi, cameras.azimuth + math.pi)
    opposite = Cameras(cameras.extrinsics * turn, cameras.fovy, cameras.elevation, azimuth)
    return interleaved(cameras, opposite)


def interleaved(first: Cameras, second: Cameras) -> Cameras:
    """`[P, 2 V]`: the cameras `[P, V]` of both in turn."""

    def both(one: Tensor, other: Tensor) -> Tensor:
        return torch.stack((one, other), dim=2).flatten(1, 2)

    return Cameras(
        both(first.extrinsics, second.extrinsics),
        both(first.fovy, second.fovy),
        both(first.elevation, second.elevation),
        both(first.azimuth, second.azimuth),
    )


def rays(cameras: Cameras, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Rays through the pixel centres: origins `[..., 3]` and unit directions `[..., height, width, 3]`, world frame.

    Row 0 is the top of the image. Pixels are square; `fovy` spans the height.
    """
    dtype, device = cameras.fovy.dtype, cameras.fovy.device
    half = torch.tan(cameras.fovy / 2)[..., None, None]
    y = 1 - (torch.arange(height, dtype=dtype, device=device) + 0.5) * 2 / height
    x = ((torch.arange(width, dtype=dtype, device=device) + 0.5) * 2 / width - 1) * (width / height)
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    in_camera = torch.stack((grid_x * half, grid_y * half, -torch.ones_like(grid_x * half)), dim=-1)
    directions = torch.einsum("...ij,...hwj->...hwi", cameras.extrinsics[..., :3, :3], in_camera)
    return cameras.extrinsics[..., :3, 3], directions / directions.norm(dim=-1, keepdim=True)
