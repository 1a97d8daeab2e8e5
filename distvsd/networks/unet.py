"""The UNet of Stable Diffusion 1.x and 2.x, and of the embedded prior: text and time in, one prediction out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distvsd.errors import BackendError
from distvsd.networks.base import Condition, LatentSpace
from distvsd.vsd.process import Process

# The weight with a row for each number of the time embedding, by its name in diffusers.
TIME_EMBEDDING = "time_embedding.linear_2.weight"


@dataclass(frozen=True)
class UNet:
    """diffusers' UNet2DConditionModel as an `Adaptable` denoiser; see there. Reads the condition's text and cameras."""

    module: nn.Module
    space: LatentSpace
    process: Process
    dtype: torch.dtype

    lora_targets: ClassVar[Sequence[str]] = ("to_q", "to_k", "to_v", "to_out.0")

    def predict(self, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `Denoiser.predict`."""
        output: Tensor = self.module(
            noisy.to(self.dtype),
            t,
            encoder_hidden_states=condition.text.to(self.dtype),
            class_labels=None if condition.cameras is None else condition.cameras.float(),
            return_dict=False,
        )[0]
        return output.float()

    def on(self, module: nn.Module) -> UNet:
        """See `Adaptable.on`."""
        return replace(self, module=module)

    def camera_width(self) -> int:
        """See `Adaptable.camera_width`. The camera takes the place of diffusers' class_embedding, which must be
        free."""
        unet: Any = self.module
        config = unet.config
        if unet.class_embedding is not None or config.class_embed_type is not None or config.class_embeddings_concat:
            raise BackendError(
                "The prior's UNet already has class conditioning "
                f"(class_embed_type {config.class_embed_type!r}, num_class_embeds {config.num_class_embeds!r}), and "
                "the score network needs that place for its camera condition; use a prior without class conditioning."
            )
        if config.addition_embed_type is not None:
            raise BackendError(
                f"The prior's UNet asks for additional conditions (addition_embed_type {config.addition_embed_type!r}),"
                " which the score network does not have; use a prior conditioned on one text embedding, such as "
                "Stable Diffusion 1.x or 2.x."
            )
        return int(unet.time_embedding.linear_2.out_features)

    def add_camera(self, module: nn.Module, embedding: nn.Module | None) -> nn.Module | None:
        """See `Adaptable.add_camera`.

        With class_embed_type None, UNet2DConditionModel.get_class_embed hands class_labels to `class_embedding` as they
        are, and casts the result to the dtype of the sample.
        """
        unet: Any = module
        before: nn.Module | None = unet.class_embedding
        unet.class_embedding = embedding
        return before
