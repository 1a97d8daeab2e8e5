"""What a prior is to the rest of the program: a frozen text-to-image model that sees latents and never 3-D."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from distvsd.prior.prompts import PromptTable
from distvsd.vsd.process import PredictionType


class Prior(Protocol):
    """The frozen teacher. N samples, C latent channels, h x w latent pixels; every tensor on the prior's own device.

    Nothing here communicates: each rank loads its own prior and calls it on its own samples, in any number, zero too.

    unet: frozen (eval, no gradients), in the configured dtype, `unet(x, t, encoder_hidden_states=text).sample`.
    prediction_type: what it outputs. alphas_cumprod: `[T]` float32. texts: the encoded prompts, by particle id.
    """

    unet: torch.nn.Module
    alphas_cumprod: Tensor
    prediction_type: PredictionType
    texts: PromptTable

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) of a square image of `resolution` pixels a side. Raises PriorError if it has no latents."""
        ...

    def encode(self, images: Tensor, edge: int | None = None) -> Tensor:
        """Images `[N, 3, H, W]` in [0, 1] to latents `[N, C, h, w]` float32; deterministic, differentiable.

        edge: the pixels a side to which they are resized first.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[N, C, h, w]` to images `[N, 3, H, W]` float32, not clamped to [0, 1]."""
        ...

    def eps(self, noisy: Tensor, timesteps: Tensor, ids: Tensor, views: Tensor, guidance_scale: float) -> Tensor:
        """The noise predicted in `noisy` `[N, C, h, w]` under classifier-free guidance, float32, without gradient.

        timesteps, ids (particles), views (indices into VIEWS): `[N]` int64.
        """
        ...

    def sample(
        self,
        prompts: Sequence[int] | Sequence[str] | Tensor,
        count: int,
        guidance_scale: float,
        steps: int,
        seed: int,
    ) -> Tensor:
        """Ancestral samples `[count, 3, H, W]` float32 in [0, 1]; image i is a function of (seed, i, its prompt)."""
        ...

    def identity(self) -> str:
        """A hash of what the prior is made of, the same for every path, device, dtype and prompt."""
        ...

    def is_identified_by(self, stored: str) -> bool:
        """Whether the identity that a checkpoint holds is this prior's, by this version's rule or an older one's."""
        ...
