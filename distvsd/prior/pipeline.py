"""The prior of a run: a frozen diffusers pipeline whose prompts are already encoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distvsd.errors import PriorError
from distvsd.networks.codec import Codec
from distvsd.networks.folder import PipelineFolder
from distvsd.networks.identity import Identity
from distvsd.networks.resize import resized
from distvsd.prior.prompts import PromptTable
from distvsd.vsd.process import PredictionType, to_eps
from distvsd.vsd.samples import slices


class Pipeline:
    """The one implementation of the `Prior` protocol; made by `load_prior`.

    scheduler: of the pipeline's own class, not stepped by anyone (samplers take a copy). micro_batch: samples a UNet
    call, 0 for all at once; a call with guidance runs twice as many rows. device: where it computes.
    """

    def __init__(
        self,
        folder: PipelineFolder,
        unet: torch.nn.Module,
        codec: Codec,
        scheduler: Any,
        prediction_type: PredictionType,
        texts: PromptTable,
        micro_batch: int,
        device: torch.device,
    ) -> None:
        self.folder = folder
        self.unet = unet
        self.codec = codec
        self.scheduler = scheduler
        self.prediction_type: PredictionType = prediction_type
        self.texts = texts
        self.micro_batch = micro_batch
        self.dtype, self.device = next(unet.parameters()).dtype, device
        self.alphas_cumprod: Tensor = scheduler.alphas_cumprod.to(self.device, torch.float32)
        self._identity = Identity(folder)

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def resolution(self) -> int:
        """Image pixels a side the UNet was trained at."""
        return self.folder.native_resolution

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) of a square image. Raises PriorError unless `resolution` is a multiple of a latent pixel."""
        side, rest = divmod(resolution, self.folder.downscale)
        if rest or side < 1:
            raise PriorError(
                f"an image of {resolution} x {resolution} pixels has no latents in the prior {self.folder.path}, where "
                f"a latent pixel holds {self.folder.downscale} on a side; give a multiple of {self.folder.downscale}"
            )
        return self.folder.latent_channels, side, side

    def encode(self, images: Tensor, edge: int | None = None) -> Tensor:
        """Images `[N, 3, H, W]` in [0, 1] to latents `[N, C, h, w]` float32; deterministic, differentiable to images.

        edge: the pixels a side to which they are resized first. H and W, or edge, are multiples of a latent pixel. No
        gradient is kept for anything but the images.
        """
        if edge is not None:
            images = resized(images, edge)
        if len(images) == 0:
            shape = (size // self.folder.downscale for size in images.shape[2:])
            return images.new_zeros((0, self.folder.latent_channels, *shape), dtype=torch.float32)
        return self.codec.encode(images).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images `[N, 3, H, W]` float32, nominally in [0, 1] but not clamped; without gradient."""
        return self.codec.decode(latents).float()

    @torch.no_grad()
    def eps(self, noisy: Tensor, timesteps: Tensor, ids: Tensor, views: Tensor, guidance_scale: float) -> Tensor:
        """eps_uncond + s (eps_cond - eps_uncond) for `noisy` `[N, C, h, w]`: float32, without gradient.

        timesteps, ids, views: `[N]` int64. Guidance is applied to the network's outputs, which is the same thing: for
        one x_t, eps is affine in every kind of output. With s = 1, or 0, the pass that counts for nothing is not run.
        """
        output = self.guided_output(noisy, timesteps, self.texts.viewed(ids, views), guidance_scale)
        abar = self.alphas_cumprod[timesteps.to(self.device)]
        return to_eps(output, noisy.float(), abar, self.prediction_type)

    @torch.no_grad()
    def guided_output(self, noisy: Tensor, timesteps: Tensor, text: Tensor, guidance_scale: float) -> Tensor:
        """The UNet's own output under guidance, float32, shaped as `noisy`. timesteps `[N]`, text `[N, L, D]`."""
        if len(noisy) == 0:
            return noisy.float()
        parts = [
            self._guided_part(noisy[part], timesteps[part], text[part], guidance_scale)
            for part in slices(len(noisy), self.micro_batch)
        ]
        return torch.cat(parts)

    def _guided_part(self, noisy: Tensor, timesteps: Tensor, text: Tensor, guidance_scale: float) -> Tensor:
        if guidance_scale == 1:
            return self._output(noisy, timesteps, text)
        negative = self.texts.negative.expand(len(text), -1, -1)
        if guidance_scale == 0:
            return self._output(noisy, timesteps, negative)
        both = self._output(noisy.repeat(2, 1, 1, 1), timesteps.repeat(2), torch.cat((negative, text)))
        unconditional, conditional = both.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    def _output(self, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        output: Tensor = self.unet(noisy.to(self.dtype), timesteps, encoder_hidden_states=text).sample
        return output.float()

    def sample(
        self,
        prompts: Sequence[int] | Sequence[str] | Tensor,
        count: int,
        guidance_scale: float,
        steps: int,
        seed: int,
        views: Tensor | None = None,
        resolution: int | None = None,
        batch_size: int = 16,
    ) -> Tensor:
        """Ancestral samples `[count, 3, H, W]` float32 in [0, 1], drawn with the pipeline's own scheduler.

        prompts: particle ids, or prompts the prior was loaded with; image i has `prompts[i % len(prompts)]`, from view
        `views[i]` where views `[count]` are given. Image i depends on (seed, i) and its prompt and, up to rounding, not
        on `batch_size`. Raises PriorError where the samples are not finite.
        """
        from distvsd.prior.sample import ancestral

        ids = self._ids(prompts)
        ids = ids[torch.arange(count) % len(ids)]
        return ancestral(self, ids, views, guidance_scale, steps, seed, resolution or self.resolution, batch_size)

    def _ids(self, prompts: Sequence[int] | Sequence[str] | Tensor) -> Tensor:
        if isinstance(prompts, Tensor):
            return prompts.cpu()
        if isinstance(prompts, str):
            prompts = [prompts]
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        return torch.tensor(self.texts.ids_of(texts) if texts else [int(prompt) for prompt in prompts])

    def identity(self) -> str:
        """A hash of everything the prior is made of, `v2:` and 64 hex digits; the first call reads all files."""
        return self._identity.current()

    def is_identified_by(self, stored: str) -> bool:
        """Whether an identity in a checkpoint, also of one written by an older version, is that of this prior."""
        return self._identity.fits(stored)
