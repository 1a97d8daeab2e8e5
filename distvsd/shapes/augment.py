"""Degrades drawings of the world so that they resemble renders of radiance fields and diffusion samples.

Only the training of the classifier uses it: in use the classifier sees renders and samples, never clean drawings.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

BLUR_PIXELS = 1.1  # largest standard deviation
NOISE = 0.1  # largest standard deviation
BLUR_TAPS = 7


def augment(pool: Tensor, room: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Degraded images `[N, 3, H, W]` in [0, 1] and the ink of faces `[N, 1, H, W]`, from layers uint8 `[N, 5, H, W]`.

    Layers: colour times opacity, opacity, ink. room: `[N]` bool, drawings that fill the image. Each degradation is
    applied to a random part of the images: shift and zoom, blur, a coarser raster, blotches, translucency, tinted
    backgrounds, brightness and contrast, pixel noise.
    """
    count = len(pool)

    def uniform(low: float, high: float, share: float = 1.0, neutral: float = 0.0) -> Tensor:
        """`[N, 1, 1, 1]`: uniform in low..high for a share of the images, neutral for the others."""
        values, gate = torch.rand(2, count, 1, 1, 1, generator=draw)
        return torch.where(gate < share, low + (high - low) * values, torch.full_like(values, neutral))

    layers = _moved(pool.float() / 255, room, draw)
    layers = _blurred(layers, uniform(0.3, BLUR_PIXELS, 0.5, neutral=0.05))
    coarse = functional.interpolate(layers, scale_factor=0.5, mode="area")
    coarse = functional.interpolate(coarse, scale_factor=2.0, mode="bilinear", align_corners=False)
    layers = torch.where(uniform(0, 1) < 0.2, coarse, layers)
    # Blotches change mostly the brightness; of the hue they would turn orange into red and yellow.
    blotches = _smooth_noise(count, 1, pool.shape[-1], 8, draw) + 0.3 * _smooth_noise(count, 3, pool.shape[-1], 8, draw)
    color = layers[:, :3] * (1 + uniform(0.0, 0.2, 0.5) * blotches)
    opacity = uniform(0.75, 1.0, 0.3, neutral=1.0).where(~room[:, None, None, None], torch.ones(()))
    tint = uniform(0.0, 0.2, 0.3) * (torch.rand(count, 3, 1, 1, generator=draw) - 0.5)
    background = (uniform(0.0, 1.0) + tint).clamp(0, 1)
    images = color * opacity + (1 - layers[:, 3:4] * opacity) * background
    images = (images - 0.5) * uniform(0.8, 1.2, 0.5, neutral=1.0) + 0.5 + uniform(-0.1, 0.1, 0.5)
    noise = torch.randn(images.shape, generator=draw)
    return (images + uniform(0.0, NOISE, 0.5) * noise).clamp(0, 1), layers[:, 4:]


def blank_images(count: int, draw: torch.Generator, resolution: int = 64) -> Tensor:
    """Images `[count, 3, resolution, resolution]` without an object.

    Plain greys, plain colours, gradients, smooth colour clouds and block noise, with more or less pixel noise.
    """
    grey = torch.rand(count, 1, 1, 1, generator=draw).expand(-1, 3, -1, -1)
    plain = torch.rand(count, 3, 1, 1, generator=draw)
    ramps = functional.interpolate(
        torch.rand(count, 3, 2, 2, generator=draw), resolution, mode="bilinear", align_corners=True
    )
    clouds = 0.5 + 0.25 * _smooth_noise(count, 3, resolution, 6, draw)
    blocks = torch.rand(count, 3, resolution // 4, resolution // 4, generator=draw)
    blocks = functional.interpolate(blocks, scale_factor=4.0, mode="nearest")
    size = (count, 3, resolution, resolution)
    kinds = torch.stack(
        [kind.expand(size) for kind in (grey, plain, grey + 0.2 * (ramps - 0.5), ramps, clouds, blocks)]
    )
    pick = torch.randint(len(kinds), (count,), generator=draw)
    strength = torch.rand(count, 1, 1, 1, generator=draw) ** 2 * 0.3
    return (kinds[pick, torch.arange(count)] + strength * torch.randn(size, generator=draw)).clamp(0, 1)


def _moved(layers: Tensor, room: Tensor, draw: torch.Generator) -> Tensor:
    """Shifts and zooms one half of the images and mirrors half of all; rooms are only enlarged."""
    count = len(layers)
    move = torch.rand(count, generator=draw) < 0.5
    spread = torch.rand(count, 3, generator=draw) * 2 - 1
    window = 1.0 + 0.15 * spread[:, 0]  # the visible part of the image: below 1 enlarges
    window = torch.where(room, window.clamp_max(1.0), window).where(move, torch.ones(()))
    shift = (0.12 * spread[:, 1:] * (~room & move)[:, None]).unbind(1)
    mirror = (torch.rand(count, generator=draw) < 0.5).float() * 2 - 1
    zero = torch.zeros(count)
    theta = torch.stack((window * mirror, zero, shift[0], zero, window, shift[1]), dim=1).view(count, 2, 3)
    grid = functional.affine_grid(theta, list(layers.shape), align_corners=False)
    return functional.grid_sample(layers, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _blurred(layers: Tensor, deviation: Tensor) -> Tensor:
    """Gaussian blur with one standard deviation (pixels, `[N, 1, 1, 1]`) an image; edges are repeated."""
    count, channels, height, width = layers.shape
    offsets = torch.arange(BLUR_TAPS) - BLUR_TAPS // 2
    kernel = torch.exp(-0.5 * (offsets / deviation.reshape(count, 1)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)[:, None, None]
    padded = functional.pad(layers, (BLUR_TAPS // 2,) * 4, mode="replicate").reshape(1, count * channels, -1, width + 6)
    across = functional.conv2d(padded, kernel, groups=count * channels)
    both = functional.conv2d(across, kernel.transpose(2, 3), groups=count * channels)
    return both.reshape(count, channels, height, width)


def _smooth_noise(count: int, channels: int, resolution: int, cells: int, draw: torch.Generator) -> Tensor:
    """Cloud-like noise `[count, channels, resolution, resolution]` of about unit size, with `cells` grid cells a
    side."""
    coarse = torch.randn(count, channels, cells, cells, generator=draw)
    return functional.interpolate(coarse, resolution, mode="bicubic", align_corners=True)
