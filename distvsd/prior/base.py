"""The interface of a prior: a frozen text-to-image model that works on latents; it is given no 3-D representation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from distvsd.networks.base import Adaptable, Condition
from distvsd.prior.guidance import ClassifierFree
from distvsd.prior.prompts import PromptTable
from distvsd.vsd.objectives.base import Predictions, PriorPart


class Prior(Protocol):
    """The frozen teacher. N samples, C latent channels, h x w latent pixels; every tensor on the prior's own device.

    Nothing here communicates: each rank loads its own prior and calls it on its own samples; N may be 0.
    denoiser: the network, frozen. texts: the encoded prompts, by particle id.
    """

    @property
    def denoiser(self) -> Adaptable: ...
    @property
    def texts(self) -> PromptTable: ...

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) of a square image of `resolution` pixels an edge. Raises PriorError if it has no latents."""
        ...

    def encode(self, images: Tensor, edge: int | None = None) -> Tensor:
        """Images `[N, 3, H, W]` in [0, 1] to latents `[N, C, h, w]` float32; deterministic, differentiable.

        edge: they are first resized to this many pixels an edge.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[N, C, h, w]` to images `[N, 3, H, W]` float32, not clamped to [0, 1]."""
        ...

    def condition(
        self, ids: Tensor, views: Tensor | None = None, cameras: Tensor | None = None, views_per_particle: int = 1
    ) -> Condition:
        """The condition of samples of particles `ids` `[N]`. views: `[N]` indices into VIEWS, or None for no view."""
        ...

    def ask(
        self, noisy: Tensor, t: Tensor, condition: Condition, parts: frozenset[PriorPart], guidance: ClassifierFree
    ) -> Predictions:
        """The noise predicted in `noisy` `[N, C, h, w]` at times `[N]`, only the requested parts; no gradient."""
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
        """Whether the identity that a checkpoint holds is this prior's, by the current rule or an older one."""
        ...
