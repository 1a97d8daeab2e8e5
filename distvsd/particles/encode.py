"""Plain pictures as latents: what image particles in latents begin around."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def encode_plain(encode: Callable[[Tensor], Tensor], size: int, colors: Tensor) -> Tensor:
    """Latents `[P, C, h, w]` of plain pictures of `size` pixels in the colours `[P, 3, 1, 1]`.

    encode: the prior's, from images `[N, 3, H, W]` to latents. One picture a call, so that no bit depends on which
    other particles are on the rank.
    """
    encoded = [encode(color.expand(1, 3, size, size)) for color in colors]
    return torch.cat(encoded) if encoded else encode(colors.expand(0, 3, size, size))
