"""The image codec beside a VAE: a lossless space-to-depth rearrangement with a scale.

It stands in the `vae` folder of a pipeline, with `_class_name: PatchCodec` in its config.json, and needs no weights.
Linear and orthogonal up to the scale, so gradients reach the pixels undistorted.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

CLASS_NAME = "PatchCodec"


class PatchCodec(torch.nn.Module):
    """Images in [0, 1] `[B, 3, H, W]` <-> latents `[B, 3 p^2, H/p, W/p]`; differentiable, exact in both directions."""

    def __init__(self, patch_size: int, scaling_factor: float) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.scaling_factor = scaling_factor

    def encode(self, images: Tensor) -> Tensor:
        return torch.nn.functional.pixel_unshuffle((images * 2 - 1) * self.scaling_factor, self.patch_size)

    def decode(self, latents: Tensor) -> Tensor:
        return (torch.nn.functional.pixel_shuffle(latents, self.patch_size) / self.scaling_factor + 1) / 2

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = {"_class_name": CLASS_NAME, "patch_size": self.patch_size, "scaling_factor": self.scaling_factor}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
