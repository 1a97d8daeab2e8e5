"""An image codec in place of a VAE: a lossless space-to-depth rearrangement, with a gain on variation inside a patch.

A pipeline's `vae` folder selects it with `_class_name: PatchCodec` in its config.json; it has no weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

CLASS_NAME = "PatchCodec"


class PatchCodec(torch.nn.Module):
    """Images in [0, 1] `[B, 3, H, W]` <-> latents `[B, 3 p^2, H/p, W/p]`; linear, differentiable, exact both ways.

    detail_gain: factor on the difference of a pixel from the mean of its patch and channel. In images of plain surfaces
    that difference is small (edges, eyes). Without a gain, even weak noise would hide it from a diffusion model, and
    errors in it would hardly count in the loss.
    """

    def __init__(self, patch_size: int, scaling_factor: float, detail_gain: float = 1.0) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.scaling_factor = scaling_factor
        self.detail_gain = detail_gain

    def encode(self, images: Tensor) -> Tensor:
        pixels = torch.nn.functional.pixel_unshuffle((images * 2 - 1) * self.scaling_factor, self.patch_size)
        return self._amplified(pixels, self.detail_gain)

    def decode(self, latents: Tensor) -> Tensor:
        pixels = self._amplified(latents, 1 / self.detail_gain)
        return (torch.nn.functional.pixel_shuffle(pixels, self.patch_size) / self.scaling_factor + 1) / 2

    def _amplified(self, values: Tensor, gain: float) -> Tensor:
        if gain == 1:
            return values
        pixels = values.unflatten(1, (-1, self.patch_size**2))  # channel by channel, then the pixels of a patch
        return torch.lerp(pixels.mean(2, keepdim=True).expand_as(pixels), pixels, gain).flatten(1, 2)

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "_class_name": CLASS_NAME,
            "patch_size": self.patch_size,
            "scaling_factor": self.scaling_factor,
            "detail_gain": self.detail_gain,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
