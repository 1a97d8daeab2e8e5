"""Resizes pictures, with a gradient whose bits are the same every time."""

from __future__ import annotations

import torch
from torch import Tensor


def resized(images: Tensor, edge: int) -> Tensor:
    """Images `[N, C, H, W]` as `[N, C, edge, edge]`: bilinear, antialiased where it shrinks; differentiable.

    The same numbers as torch's `interpolate(mode="bilinear", antialias=True)`, which adds its gradient in no fixed
    order on CUDA; hence a matrix for each axis here. Images that already have the size are returned as they are.
    """
    height, width = images.shape[-2:]
    if (height, width) == (edge, edge):
        return images
    return _axis(height, edge, images) @ images @ _axis(width, edge, images).T


def _axis(length: int, edge: int, like: Tensor) -> Tensor:
    """The weights `[edge, length]` of old pixels in new ones; a row sums to 1.

    A triangle filter centred on each new pixel, two old pixels wide, or two new ones where those are larger.
    """
    scale = length / edge
    centres = (torch.arange(edge, dtype=torch.float64) + 0.5) * scale
    distances = (torch.arange(length) + 0.5 - centres[:, None]).abs() / max(scale, 1.0)
    weights = (1 - distances).clamp_min(0)
    return (weights / weights.sum(1, keepdim=True)).to(like)
