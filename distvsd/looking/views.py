"""The fixed views from which particles are looked at, rendered in parts, so that any number of particles fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from distvsd.cameras import Cameras, OrbitSampler
from distvsd.config import Config

VIEWS = 8
ELEVATION_DEG = 15.0
BACKGROUND = 0.5
POINTS_AT_ONCE = 1 << 21  # field points of one render call; a field keeps some hundred bytes for each


class Restored(Protocol):
    """The particles of a run as its newest checkpoint holds them."""

    @property
    def config(self) -> Config: ...

    @property
    def ids(self) -> list[int]: ...

    def render(self, ids: list[int], cameras: Cameras, resolution: int, background: float) -> tuple[Tensor, Tensor]:
        """Images `[P, V, 3, H, W]` and opacity `[P, V, 1, H, W]` of particles from cameras `[P, V]`, no gradient."""
        ...


def ring(config: Config, num_views: int = VIEWS, elevation_deg: float = ELEVATION_DEG) -> Cameras:
    """Cameras `[1, V]` evenly around from the front, at the run's middle distance and field of view.

    Images have one view, because they do not depend on the camera.
    """
    ranges = config.cameras
    sampler = OrbitSampler(ranges.elevation, ranges.azimuth, ranges.distance, ranges.fovy)
    return sampler.ring(1, 1 if config.particles.kind == "image" else num_views, elevation_deg)


def final_resolution(config: Config) -> int:
    """Pixels along an edge in the last round."""
    return config.render.resolution_at(config.schedule.rounds - 1)


def groups(config: Config, ids: Sequence[int], num_views: int) -> Iterator[list[int]]:
    """The ids in order, in groups of which all views can be rendered at once; one particle at least."""
    size = max(1, _views_at_once(config) // num_views)
    for first in range(0, len(ids), size):
        yield list(ids[first : first + size])


def render_group(restored: Restored, ids: list[int], cameras: Cameras) -> tuple[Tensor, Tensor]:
    """Images `[P, V, 3, H, W]` and opacity `[P, V, 1, H, W]`, on the CPU, of one of `groups` from cameras `[1, V]`.

    Before a grey background, at the resolution of the last round. A single particle's views are rendered in parts.
    """
    config, num_views = restored.config, cameras.shape[1]
    resolution = final_resolution(config)
    size = num_views if len(ids) > 1 else max(1, _views_at_once(config))
    rows = torch.zeros(len(ids), dtype=torch.int64)
    parts = []
    for first in range(0, num_views, size):
        images, opacity = restored.render(ids, cameras[rows, first : first + size], resolution, BACKGROUND)
        parts.append((images.cpu(), opacity.cpu()))
    return torch.cat([images for images, _ in parts], dim=1), torch.cat([opacity for _, opacity in parts], dim=1)


def _views_at_once(config: Config) -> int:
    samples = config.particles.nerf.samples_per_ray if config.particles.kind == "nerf" else 1
    return POINTS_AT_ONCE // (samples * final_resolution(config) ** 2)
