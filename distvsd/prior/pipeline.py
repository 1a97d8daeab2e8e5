"""The prior of a run: a frozen diffusers pipeline whose prompts are already encoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from distvsd.networks.base import Adaptable, Condition
from distvsd.networks.codec import Codec
from distvsd.networks.folder import PipelineFolder
from distvsd.networks.identity import Identity
from distvsd.prior.guidance import GUIDED, ClassifierFree
from distvsd.prior.prompts import PromptTable
from distvsd.vsd.objectives.base import Predictions, PriorPart
from distvsd.vsd.process import Process
from distvsd.vsd.resize import resized
from distvsd.vsd.samples import slices


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """The one implementation of the `Prior` protocol; made by `load_prior`.

    denoiser: frozen. scheduler: of the pipeline's own class; it is never stepped, samplers take a copy. micro_batch:
    samples per call of the network, 0 for all at once; a call has at least all views of a particle, and with guidance
    twice as many rows as samples. device: where it computes.
    """

    folder: PipelineFolder
    denoiser: Adaptable
    codec: Codec
    scheduler: Any
    texts: PromptTable
    micro_batch: int
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return self.denoiser.dtype

    @property
    def process(self) -> Process:
        return self.denoiser.process

    @property
    def resolution(self) -> int:
        """Image pixels an edge that the network was trained at."""
        return self.denoiser.space.resolution

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) of a square image. Raises PriorError unless `resolution` is a multiple of a latent pixel."""
        return self.denoiser.space.shape(resolution)

    def encode(self, images: Tensor, edge: int | None = None) -> Tensor:
        """Images `[N, 3, H, W]` in [0, 1] to latents `[N, C, h, w]` float32; deterministic, differentiable to images.

        edge: they are first resized to this many pixels an edge. H and W, or edge, are multiples of a latent pixel. No
        gradient is kept for anything but the images.
        """
        if edge is not None:
            images = resized(images, edge)
        if len(images) == 0:
            space = self.denoiser.space
            shape = (size // space.downscale for size in images.shape[2:])
            return images.new_zeros((0, space.channels, *shape), dtype=torch.float32)
        return self.codec.encode(images).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images `[N, 3, H, W]` float32, nominally in [0, 1] but not clamped; without gradient."""
        return self.codec.decode(latents).float()

    def condition(
        self, ids: Tensor, views: Tensor | None = None, cameras: Tensor | None = None, views_per_particle: int = 1
    ) -> Condition:
        """The condition of samples of particles `ids` `[N]`: the prompt of each.

        views: `[N]` indices into VIEWS that the prompts name; None for prompts without a view. cameras: `[N, 16]`.
        """
        texts = self.texts.bare(ids) if views is None else self.texts.viewed(ids, views)
        return replace(texts, cameras=cameras, views_per_particle=views_per_particle)

    @torch.no_grad()
    def ask(
        self, noisy: Tensor, t: Tensor, condition: Condition, parts: frozenset[PriorPart], guidance: ClassifierFree
    ) -> Predictions:
        """The noise predicted in `noisy` `[N, C, h, w]` at times `[N]`: the requested parts, float32, no gradient."""
        outputs = self.outputs(noisy, t, condition, parts, guidance)
        return Predictions(**{part: self.process.to_eps(output, noisy.float(), t) for part, output in outputs.items()})

    @torch.no_grad()
    def outputs(
        self, noisy: Tensor, t: Tensor, condition: Condition, parts: frozenset[PriorPart], guidance: ClassifierFree
    ) -> dict[PriorPart, Tensor]:
        """The network's own outputs for the requested parts, float32, shaped as `noisy`; no call where N is 0."""
        if len(noisy) == 0:
            return dict.fromkeys(parts, noisy.float())
        negative = condition.with_text_of(self.texts.negative(len(noisy)))
        found = [
            guidance.outputs(self.denoiser, noisy[rows], t[rows], condition[rows], negative[rows], parts)
            for rows in slices(len(noisy), self.micro_batch, condition.views_per_particle)
        ]
        return {part: torch.cat([outputs[part] for outputs in found]) for part in parts}

    def guided_output(self, noisy: Tensor, t: Tensor, condition: Condition, guidance_scale: float) -> Tensor:
        """The network's own output under classifier-free guidance, as samplers need it."""
        return self.outputs(noisy, t, condition, GUIDED, ClassifierFree(guidance_scale))["guided"]

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

    @cached_property
    def _identity(self) -> Identity:
        return Identity(self.folder)

    def identity(self) -> str:
        """A hash of everything the prior is made of, `v2:` and 64 hex digits; the first call reads all files."""
        return self._identity.current()

    def is_identified_by(self, stored: str) -> bool:
        """Whether an identity from a checkpoint, also one by an older version, is that of this prior."""
        return self._identity.fits(stored)
