"""The fixed views from which particles are looked at, rendered in parts, so that any number of particles fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distvsd.cameras import Cameras
from distvsd.looking.opened import Opened

VIEWS = 8
BACKGROUND = 0.5
POINTS_AT_ONCE = 1 << 21  # at which one render call evaluates particles; a field keeps some hundred bytes for each


def inspection(opened: Opened, num_views: int = VIEWS) -> Cameras:
    """Cameras `[1, V]` from which every particle is looked at; one where all cameras see the same."""
    return opened.sampler.inspection(num_views if opened.particle.has_views else 1)


def groups(opened: Opened, ids: Sequence[int], num_views: int) -> Iterator[list[int]]:
    """The ids in order, in groups of which all views can be rendered at once; one particle at least."""
    size = max(1, _views_at_once(opened) // num_views)
    for first in range(0, len(ids), size):
        yield list(ids[first : first + size])


def render_group(opened: Opened, ids: list[int], cameras: Cameras) -> tuple[Tensor, Tensor]:
    """Images `[P, V, 3, H, W]` and opacity `[P, V, 1, H, W]`, on the CPU, of one of `groups` from cameras `[1, V]`.

    Before a grey background, at the resolution of the last round. A single particle's views are rendered in parts.
    """
    num_views, resolution = cameras.shape[1], opened.config.final_resolution
    size = num_views if len(ids) > 1 else max(1, _views_at_once(opened))
    rows = torch.zeros(len(ids), dtype=torch.int64)
    parts = []
    for first in range(0, num_views, size):
        images, opacity = opened.render(ids, cameras[rows, first : first + size], resolution, BACKGROUND)
        parts.append((images.cpu(), opacity.cpu()))
    return torch.cat([images for images, _ in parts], dim=1), torch.cat([opacity for _, opacity in parts], dim=1)


def _views_at_once(opened: Opened) -> int:
    return POINTS_AT_ONCE // opened.particle.cost(opened.config.final_resolution).points
