"""The interface of a network: a denoiser in a latent space, and the conditions that it takes.

Only this package and `vsd/process.py` depend on how a diffusers model is called, what its times are and what it
predicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distvsd.errors import PriorError
from distvsd.vsd.process import Process


@dataclass(frozen=True)
class LatentSpace:
    """The latent space of a denoiser. channels: of a latent. downscale: image pixels along an edge of a latent pixel, 1
    for a pixel model. resolution: edge of the images that it was trained at, pixels."""

    channels: int
    downscale: int
    resolution: int

    def shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) of a square image of `resolution` pixels an edge. Raises PriorError unless that is a positive
        multiple of `downscale`."""
        side, rest = divmod(resolution, self.downscale)
        if rest or side < 1:
            raise PriorError(
                f"an image of {resolution} x {resolution} pixels has no latents in the prior, where a latent pixel has "
                f"an edge of {self.downscale} pixels; give a multiple of {self.downscale}"
            )
        return self.channels, side, side


@dataclass(frozen=True)
class Condition:
    """What N samples are conditioned on; every tensor has N rows. A network ignores what it does not read.

    text: `[N, L, D]` token embeddings. pooled: `[N, D]` one vector per text. mask: `[N, L]`, 1 for a token and 0 for
    padding. cameras: `[N, 16]` float32 camera-to-world matrices, row by row. sizes: `[N, 6]` the size and crop numbers
    of SDXL. views_per_particle: rows of a particle, which are adjacent; a multi-view network attends over them.
    """

    text: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None
    cameras: Tensor | None = None
    sizes: Tensor | None = None
    views_per_particle: int = 1

    def __len__(self) -> int:
        return self.text.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> Condition:
        return replace(self, **{name: column[rows] for name, column in self._columns().items()})

    def cat(self, other: Condition) -> Condition:
        """The rows of this condition, then those of `other`. Both must have the same columns."""
        theirs = other._columns()
        joined: dict[str, Any] = {n: torch.cat((column, theirs[n])) for n, column in self._columns().items()}
        return replace(self, **joined)

    def with_text_of(self, other: Condition) -> Condition:
        """The same samples with text, pooled and mask of `other`, which must have as many rows."""
        return replace(self, text=other.text, pooled=other.pooled, mask=other.mask)

    def _columns(self) -> dict[str, Any]:
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: column for name, column in columns.items() if isinstance(column, Tensor)}


class Denoiser(Protocol):
    """A frozen network, or one with an adapter: the same signature for every architecture.

    space: its latent space. process: what it was trained on. dtype: of its parameters; inputs are cast to it.
    """

    @property
    def space(self) -> LatentSpace: ...
    @property
    def process(self) -> Process: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def predict(self, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's own output for `noisy` `[N, C, h, w]` at times `[N]`: float32, N > 0, shaped as `noisy`.

        Rows of one particle are adjacent; rows of different particles do not depend on each other. Differentiable in
        the trainable parameters. Communicates only where a strategy has spread the module over ranks.
        """
        ...


class Adaptable(Denoiser, Protocol):
    """A denoiser made of one torch module, in which layers can be adapted and a camera can be added.

    module: the torch module, frozen. lora_targets: suffixes of the names of the linear layers that get an adapter.
    """

    @property
    def module(self) -> nn.Module: ...
    @property
    def lora_targets(self) -> Sequence[str]: ...

    def on(self, module: nn.Module) -> Adaptable:
        """The same denoiser computing with another module of the same structure."""
        ...

    def camera_width(self) -> int:
        """Length of the vector that the network adds to its time embedding.

        Raises BackendError where a camera cannot be added.
        """
        ...

    def add_camera(self, module: nn.Module, embedding: nn.Module | None) -> nn.Module | None:
        """Makes `module` add `embedding(condition.cameras)` to its time embedding; None removes the embedding.

        Returns the embedding that was there before. module: of this denoiser's structure.
        """
        ...
