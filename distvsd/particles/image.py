"""Particles that are images: the paper's two-dimensional experiment (g(theta, c) = theta), in pixels or in latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distvsd.cameras import Cameras
from distvsd.particles.base import Keys, Parameters, Rendered
from distvsd.vsd.rng import Purpose, normal, uniform


@dataclass(frozen=True)
class ImageParticle:
    """Images of a fixed size: `shape` is (3, H, W) for pixels, (C, h, w) of the prior's latents otherwise.

    Each starts as normal noise of `init_scale`, around grey pixels or around latents of 0. init_color: half-width of
    the uniform RGB by which the plain picture under the noise differs from mid grey, for each particle its own.
    encode: brings plain pictures, `[P, 3, 1, 1]`, to latents `[P, C, h, w]`; latents that start in colours need it.
    """

    shape: tuple[int, int, int]
    is_latent: bool
    init_scale: float
    learning_rate: Callable[[int], float]
    init_color: float = 0.0
    encode: Callable[[Tensor], Tensor] | None = None
    deterministic: bool = True

    def init(self, seed: int, ids: Tensor) -> Parameters:
        noise = self.init_scale * normal(seed, Purpose.INIT, ids, 0, self.shape)
        color = 0.5 + self.init_color * (2 * uniform(seed, Purpose.INIT, ids, 0, (3, 1, 1), lane=1) - 1)
        if not self.is_latent:
            return {"image": color + noise}
        if self.init_color == 0:
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
            image = torch.nn.functional.interpolate(
                image, (resolution, resolution), mode="bilinear", antialias=True, align_corners=False
            )
        images = image[:, None].expand(-1, cameras.shape[1], -1, -1, -1)
        return Rendered(images, torch.ones_like(images[:, :, :1]), torch.zeros_like(image[:, 0, 0, 0]))
