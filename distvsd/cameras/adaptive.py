"""Cameras in the free space of each particle, read from its density.

The paper (arXiv 2305.16213) names its fixed ranges as a limitation: no ranges fit all scenes.

Shape legend: P particles, V views, N cells along an edge of the grid, K candidate directions, S points of a ray.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from distvsd.cameras.base import Cameras, Field, interleaved, look_along
from distvsd.cameras.orbit import spread
from distvsd.cameras.scene import SceneSampler, from_centre
from distvsd.config import CamerasConfig
from distvsd.errors import ConfigError
from distvsd.vsd.rng import Purpose, uniform

DIRECTIONS: Final = 32  # drawn for each view, of which the first with enough room is taken
_PLACES, _DIRECTIONS = 1, 2  # lanes of the stream; 0 is that of the fixed ranges


@dataclass(frozen=True)
class AdaptiveSampler:
    """Positions uniform in the free space of each particle, directions and fields of view uniform in their ranges.

    Free space is read in every round, so there is no state: cameras follow from the parameters that a checkpoint holds.
    It is the set of cells of a grid of N^3 in which the density is low (`cameras.adaptive.optical_depth`) and which can
    be reached through such cells, over their faces, from the one nearest to `cameras.adaptive.start`. So what lies
    outside the walls of a room is not used. `cameras.adaptive.height` leaves out what is too low or too high.

    A position is anywhere in its cell; where the density is not low there, it is the cell's middle, where it is. The
    direction is the first of DIRECTIONS draws in which all is free up to `cameras.adaptive.clearance` (nothing is,
    outside the grid's cube), or else the one that is free farthest.

    The cameras of a particle without free space (or whose density is not finite) are those of `SceneSampler`.
    """

    config: CamerasConfig

    @property
    def edge(self) -> float:
        """Of a cell, world units."""
        return 2 * self.config.adaptive.bound / self.config.adaptive.cells

    @property
    def densest(self) -> float:
        """The density, per world unit, below which a point is free."""
        return self.config.adaptive.optical_depth / self.edge

    def sample(self, seed: int, ids: Tensor, step: int, views: int, field: Field | None) -> Cameras:
        """Raises ConfigError without a field."""
        if field is None:
            raise ConfigError(
                "cameras.kind is adaptive, which reads the density of the particles, but these have no volume; set "
                "cameras.kind=orbit or scene"
            )
        drawn = -(-views // 2) if self.config.antithetic else views
        places, found = self._places(seed, ids, step, drawn, field)
        cameras = self._looking(seed, ids, step, places, field)[:, :views]
        fixed = SceneSampler(self.config).sample(seed, ids, step, views, None)
        found = found[:, None]
        return Cameras(
            torch.where(found[..., None, None], cameras.extrinsics, fixed.extrinsics),
            torch.where(found, cameras.fovy, fixed.fovy),
            torch.where(found, cameras.elevation, fixed.elevation),
            torch.where(found, cameras.azimuth, fixed.azimuth),
        )

    def inspection(self, views: int) -> Cameras:
        return from_centre(views, self.config.fovy)

    def free_space(self, field: Field, ids: Tensor) -> Tensor:
        """The cells in which cameras of particles `ids` may be placed: bool `[P, N, N, N]`, axes x, y and z."""
        cells = self.config.adaptive.cells
        middles = self._middles(ids.device)
        is_free = self._is_free(field, middles.expand(len(ids), -1, -1))
        # The first of the nearest where several are equally near; none where nothing is free.
        away = (middles.norm(dim=-1) - self.config.adaptive.start).abs()
        start = torch.where(is_free, away, torch.inf).argmin(1, keepdim=True)
        seeds = torch.zeros_like(is_free).scatter(1, start, True) & is_free
        reached = reachable(seeds.unflatten(1, (cells,) * 3), is_free.unflatten(1, (cells,) * 3))
        height, (low, high) = middles[:cells, 2], self.config.adaptive.height
        return reached & (height >= low) & (height <= high)

    def _middles(self, device: torch.device) -> Tensor:
        """Of the cells, `[N^3, 3]`, z fastest."""
        cells = self.config.adaptive.cells
        along = (torch.arange(cells, device=device) + 0.5) * self.edge - self.config.adaptive.bound
        return torch.stack(torch.meshgrid(along, along, along, indexing="ij"), dim=-1).reshape(-1, 3)

    def _is_free(self, field: Field, points: Tensor) -> Tensor:
        """Bool `[P, ...]` of world points `[P, ..., 3]` in the cube; false also where the density is NaN."""
        return field(points.flatten(1, -2)).reshape(points.shape[:-1]) < self.densest

    def _places(self, seed: int, ids: Tensor, step: int, views: int, field: Field) -> tuple[Tensor, Tensor]:
        """Positions `[P, V, 3]`, and whether there is free space at all, bool `[P]`."""
        u = uniform(seed, Purpose.CAMERA, ids, step, (views, 4), lane=_PLACES)
        rank = self.free_space(field, ids).flatten(1).cumsum(1)  # of a free cell among the free ones, from 1
        count = rank[:, -1:]
        wanted = torch.minimum((u[..., 0] * count).long() + 1, count)
        cell = torch.searchsorted(rank, wanted).clamp(max=rank.shape[1] - 1)
        middle = self._middles(ids.device)[cell]
        place = middle + (u[..., 1:] - 0.5) * self.edge
        place = torch.where(self._is_free(field, place)[..., None], place, middle)
        return place, count[:, 0] > 0

    def _looking(self, seed: int, ids: Tensor, step: int, places: Tensor, field: Field) -> Cameras:
        """Cameras at `places` `[P, V, 3]`, followed by their opposites where the configuration asks for them."""
        views, radian = places.shape[1], math.pi / 180
        u = uniform(seed, Purpose.CAMERA, ids, step, (views, 2 * DIRECTIONS + 1), lane=_DIRECTIONS)
        elevation = spread(u[..., :DIRECTIONS], self.config.elevation, radian)
        azimuth = spread(u[..., DIRECTIONS:-1], self.config.azimuth, radian)
        fovy = spread(u[..., -1], self.config.fovy, radian)
        spots = places[:, :, None].expand(-1, -1, DIRECTIONS, -1)
        candidates = look_along(spots, elevation, azimuth, fovy[..., None].expand_as(azimuth))
        room = self._room(field, candidates)
        if self.config.antithetic:
            room = torch.minimum(room, self._room(field, _turned_on_the_spot(candidates)))
        chosen = room.argmax(-1, keepdim=True)  # the first of the largest, which are all that have enough room
        cameras = look_along(places, elevation.gather(2, chosen)[..., 0], azimuth.gather(2, chosen)[..., 0], fovy)
        return interleaved(cameras, _turned_on_the_spot(cameras)) if self.config.antithetic else cameras

    def _room(self, field: Field, cameras: Cameras) -> Tensor:
        """How many points in a row, from the camera along the middle of its view, are free: `[P, V, K]`.

        They are half a cell apart at most, and the last is at the clearance.
        """
        settings = self.config.adaptive
        count = max(1, math.ceil(2 * settings.clearance / self.edge - 1e-6))  # a whole quotient may round up
        ahead = torch.arange(1, count + 1, device=cameras.fovy.device) * (settings.clearance / count)
        position, backward = cameras.extrinsics[..., None, :3, 3], cameras.extrinsics[..., None, :3, 2]
        points = position - backward * ahead[:, None]
        is_free = self._is_free(field, points) & (points.abs().amax(-1) <= settings.bound)
        return is_free.long().cumprod(-1).sum(-1)


def _turned_on_the_spot(cameras: Cameras) -> Cameras:
    """By 180 degrees about the vertical axis through each camera."""
    turn = cameras.extrinsics.new_ones(4, 4)
    turn[:2, :3] = -1
    return replace(cameras, extrinsics=cameras.extrinsics * turn)


def reachable(seeds: Tensor, is_free: Tensor) -> Tensor:
    """The free cells that are connected to the seeds over faces of free cells; all bool `[P, N, N, N]`.

    Row i depends on row i only. The host waits for the device once in N steps.
    """
    reached = seeds & is_free
    while True:
        before = reached
        for _ in range(is_free.shape[1]):
            reached = _grown(reached) & is_free
        if torch.equal(reached, before):
            return reached


def _grown(reached: Tensor) -> Tensor:
    """With the six neighbours of each cell."""
    grown = reached.clone()
    for axis in (1, 2, 3):
        last = reached.shape[axis] - 1
        grown.narrow(axis, 1, last).logical_or_(reached.narrow(axis, 0, last))
        grown.narrow(axis, 0, last).logical_or_(reached.narrow(axis, 1, last))
    return grown
