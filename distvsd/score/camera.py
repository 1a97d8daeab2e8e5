"""The camera condition of the score network: an embedding of the pose, added to the time embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CAMERA_FEATURES = 16


class CameraEmbedding(nn.Module):
    """16 numbers of the camera-to-world matrix -> Linear -> SiLU -> Linear, `[N, 16]` to `[N, time_embed_dim]`.

    The last layer starts at zero, so that the score network starts as the prior. Initialised from torch's global
    generator: construct it inside `rng.seeded`. Computes in its own dtype, float32.
    """

    def __init__(self, time_embed_dim: int) -> None:
        super().__init__()
        self.first = nn.Linear(CAMERA_FEATURES, time_embed_dim)
        self.last = nn.Linear(time_embed_dim, time_embed_dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, cameras: Tensor) -> Tensor:
        return self.last(torch.nn.functional.silu(self.first(cameras)))  # type: ignore[no-any-return]
