"""Particles that are images: the paper's two-dimensional experiment (g(theta, c) = theta), in pixels or in latents."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from distvsd.cameras import Cameras, Field
from distvsd.config import ImageConfig
from distvsd.particles.base import Cost, Handed, Keys, Parameters, Rendered
from distvsd.vsd.resize import resized
from distvsd.vsd.rng import Purpose, normal, uniform


@dataclass(frozen=True, kw_only=True)
class ImageParticle:
    """Images of a fixed size: `shape` is (3, H, W) for pixels, (C, h, w) of the prior's latents otherwise.

    Each starts as normal noise around a plain colour of its own, or around latents of 0. learning_rate: of a round.
    encode: brings plain pictures, `[P, 3, 1, 1]`, to latents `[P, C, h, w]`; latents that start in colours need it.
    """

    config: ImageConfig
    shape: tuple[int, int, int]
    learning_rate: Callable[[int], float]
    encode: Callable[[Tensor], Tensor] | None = None
    has_views: ClassVar[bool] = False
    deterministic: ClassVar[bool] = True

    @property
    def is_latent(self) -> bool:
        return self.config.space == "latent"

    def init(self, seed: int, ids: Tensor, source: Handed | None = None) -> Parameters:
        if source is not None:
            return source.copied_for(self, ids)
        noise = self.config.init_scale * normal(seed, Purpose.INIT, ids, 0, self.shape)
        color = 0.5 + self.config.init_color * (2 * uniform(seed, Purpose.INIT, ids, 0, (3, 1, 1), lane=1) - 1)
        if not self.is_latent:
            return {"image": color + noise}
        if self.config.init_color == 0:
            return {"image": noise}
        if self.encode is None:
            raise ValueError("latents that start in colours (init_color above 0) need `encode`")
        return {"image": self.encode(color) + noise}

    def learning_rates(self, step: int) -> dict[str, float]:
        return {"image": self.learning_rate(step)}

    def render(self, parameters: Parameters, cameras: Cameras, resolution: int, keys: Keys) -> Rendered:
        return self.view(parameters, cameras, resolution, 0.0)

    def view(self, parameters: Parameters, cameras: Cameras, resolution: int, background: float) -> Rendered:
        """Every camera sees the same image; resized to `resolution` where pixels are asked for at another size."""
        image = parameters["image"]
        if not self.is_latent and resolution != image.shape[-1]:
            image = resized(image, resolution)
        images = image[:, None].expand(-1, cameras.shape[1], -1, -1, -1)
        return Rendered(images, torch.ones_like(images[:, :, :1]), torch.zeros_like(image[:, 0, 0, 0]))

    def field(self, parameters: Parameters) -> Field | None:
        return None

    def surface(self, parameters: Parameters, resolution: int, threshold: float) -> None:
        return None

    def cost(self, resolution: int) -> Cost:
        numbers = math.prod(self.shape)
        return Cost(trained=numbers, frozen=0, points=resolution**2, touched=2 * numbers)
