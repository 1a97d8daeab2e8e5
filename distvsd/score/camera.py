"""How the score network is told the camera: an embedding of the pose added to the time embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distvsd.errors import BackendError

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


def time_embed_dim(unet: Any) -> int:
    """Width of the UNet's time embedding, once it is known that a camera condition can be added to it.

    Raises BackendError for a UNet that already uses diffusers' class_embedding, the place the camera takes, or that
    asks for conditions other than text, which the score network is not given.
    """
    config = unet.config
    if unet.class_embedding is not None or config.class_embed_type is not None or config.class_embeddings_concat:
        raise BackendError(
            "The prior's UNet already has class conditioning "
            f"(class_embed_type {config.class_embed_type!r}, num_class_embeds {config.num_class_embeds!r}), and the "
            "score network needs that place for its camera condition; use a prior without class conditioning."
        )
    if config.addition_embed_type is not None:
        raise BackendError(
            f"The prior's UNet asks for additional conditions (addition_embed_type {config.addition_embed_type!r}), "
            "which the score network does not have; use a prior conditioned on one text embedding, such as "
            "Stable Diffusion 1.x or 2.x."
        )
    return int(unet.time_embedding.linear_2.out_features)


def attach_camera(unet: Any, embedding: CameraEmbedding) -> None:
    """Makes the UNet add `embedding(class_labels)` to its time embedding.

    With `class_embed_type` None, UNet2DConditionModel.get_class_embed hands class_labels to `class_embedding` as they
    are and casts the result to the dtype of the sample.
    """
    unet.class_embedding = embedding
