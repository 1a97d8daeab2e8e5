"""Plain random backgrounds, the same for every kind of particle that is drawn before one."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from distvsd.particles.base import Keys
from distvsd.vsd.rng import Purpose, uniform


def plain_backgrounds(keys: Keys, views: int, share: float, kind: Literal["color", "grey"]) -> tuple[Tensor, Tensor]:
    """A solid colour for each view, `[P, views, 3]`, and which views are drawn before it, `[P, views]` bool.

    share: of the views, on average. kind: any colour, or grey levels.
    """
    draws = uniform(keys.seed, Purpose.BACKGROUND, keys.ids, keys.step, (views, 4))
    colour = draws[..., 1:]
    if kind == "grey":
        colour = colour[..., :1].expand(-1, -1, 3)
    return colour, draws[..., 0] < share
