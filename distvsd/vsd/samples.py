"""A batch of rendered latents, with what the prior and the score network need about each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """N rendered views in the prior's latent space; every field has N rows and lies on one device.

    latents: `[N, C, h, w]` float32, with a graph to the particles until `detached`. cameras: `[N, 16]` float32, the
    flattened camera-to-world matrices. ids: `[N]` int64 particle ids. views: `[N]` int64, index of the camera's named
    view in the prior's prompts. weight: `[N]` float32, 1 where the sample is valid and 0 where it is masked.
    """

    latents: Tensor
    cameras: Tensor
    ids: Tensor
    views: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return self.latents.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """`(C, h, w)` of one sample's latents, known without a row."""
        return tuple(self.latents.shape[1:])

    def __getitem__(self, index: Tensor | slice) -> Samples:
        return Samples(*(getattr(self, field.name)[index] for field in fields(self)))

    def detached(self) -> Samples:
        """The same samples without the graph, so that they can be sent to other ranks."""
        return Samples(*(getattr(self, field.name).detach() for field in fields(self)))

    def to(self, device: torch.device | str) -> Samples:
        return Samples(*(getattr(self, field.name).to(device) for field in fields(self)))

    @staticmethod
    def cat(parts: Sequence[Samples]) -> Samples:
        """Rows of all parts, in order; at least one part."""
        return Samples(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Samples)))


def slices(count: int, size: int, unit: int = 1) -> list[slice]:
    """`count` rows in consecutive slices of about `size` (one slice where that is 0); no slice where `count` is 0.

    A unit is `unit` adjacent rows, the views of one particle. A slice holds as many whole units as fit into `size`, and
    at least one.
    """
    size = max(size // unit, 1) * unit if size else max(count, 1)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
