"""The codec of most pipelines: an AutoencoderKL with its scale and shift, with the same two methods as PatchCodec."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Codec(Protocol):
    """Images `[N, 3, H, W]` in [0, 1] <-> latents; encoding is deterministic and differentiable."""

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


class VaeCodec(torch.nn.Module):
    """Runs a frozen AutoencoderKL in its own dtype; results are float32."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.scaling_factor = float(vae.config.scaling_factor)
        self.shift_factor = float(getattr(vae.config, "shift_factor", None) or 0.0)

    def encode(self, images: Tensor) -> Tensor:
        """The mode of the posterior, shifted and scaled to what the UNet was trained on."""
        mode: Tensor = self.vae.encode((images * 2 - 1).to(self.vae.dtype)).latent_dist.mode()
        return (mode.float() - self.shift_factor) * self.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        images: Tensor = self.vae.decode((latents / self.scaling_factor + self.shift_factor).to(self.vae.dtype)).sample
        return (images.float() + 1) / 2
