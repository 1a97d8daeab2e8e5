"""What is behind a particle: a small network of the viewing direction, learned with it, or a random plain colour."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distvsd.config import NerfConfig
from distvsd.particles.base import Keys, Parameters
from distvsd.vsd.rng import Purpose, uniform

_DIRECTION_BANDS = 4
_WIDTH = 16


@dataclass(frozen=True)
class Backdrop:
    """config: `background`, `random_background` and `random_background_kind` are read."""

    config: NerfConfig

    @property
    def names(self) -> list[str]:
        """Of the parameters; none without a learned background."""
        if self.config.background != "learned":
            return []
        return [f"background_{part}{layer}" for layer in (0, 1) for part in ("weight", "bias")]

    def init(self, seed: int, ids: Tensor) -> Parameters:
        if self.config.background != "learned":
            return {}
        return {
            "background_weight0": linear_init(seed, ids, _WIDTH, 3 * 2 * _DIRECTION_BANDS, lane=101),
            "background_bias0": torch.zeros(len(ids), _WIDTH, device=ids.device),
            "background_weight1": linear_init(seed, ids, 3, _WIDTH, lane=102),
            "background_bias1": torch.zeros(len(ids), 3, device=ids.device),
        }

    def training(self, parameters: Parameters, directions: Tensor, keys: Keys) -> Tensor:
        """Colours `[P, V, H, W, 3]` along unit directions of the same shape: a random plain colour for each view, or
        what was learned. Differentiable in the parameters."""
        is_plain, color = random_plain(
            keys, directions.shape[1], self.config.random_background, self.config.random_background_kind
        )
        plain = color[:, :, None, None].expand_as(directions)
        if self.config.background != "learned":
            return plain
        learned = self._learned(parameters, directions.reshape(len(directions), -1, 3)).reshape(directions.shape)
        return torch.where(is_plain[..., None, None, None], plain, learned)

    def _learned(self, parameters: Parameters, directions_PR3: Tensor) -> Tensor:
        bands = 2.0 ** torch.arange(_DIRECTION_BANDS, device=directions_PR3.device)
        angles = (directions_PR3[..., None] * bands).flatten(2)
        encoded = torch.cat((angles.sin(), angles.cos()), dim=-1)
        hidden = torch.relu(
            torch.baddbmm(
                parameters["background_bias0"][:, None], encoded, parameters["background_weight0"].transpose(1, 2)
            )
        )
        return torch.sigmoid(
            torch.baddbmm(
                parameters["background_bias1"][:, None], hidden, parameters["background_weight1"].transpose(1, 2)
            )
        )


def random_plain(keys: Keys, views: int, share: float, kind: Literal["color", "grey"]) -> tuple[Tensor, Tensor]:
    """Which views have a plain background, a share of them on average, `[P, views]`, and its colour for every view,
    `[P, views, 3]`: any, or a grey level."""
    draws = uniform(keys.seed, Purpose.BACKGROUND, keys.ids, keys.step, (views, 4))
    color = draws[..., 1:]
    if kind == "grey":
        color = color[..., :1].expand(-1, -1, 3)
    return draws[..., 0] < share, color


def linear_init(seed: int, ids: Tensor, rows: int, columns: int, lane: int) -> Tensor:
    """Weights `[P, rows, columns]`, uniform in +-sqrt(3 / columns): unit gain for inputs of unit variance."""
    values = uniform(seed, Purpose.INIT, ids, 0, (rows, columns), lane=lane)
    return (values * 2 - 1) * math.sqrt(3 / columns)
