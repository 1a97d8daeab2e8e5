"""The renders of all ranks where each rank has its own only: everybody knows who they are, nobody has all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from distvsd.vsd.samples import Samples


@dataclass(frozen=True)
class Scattered:
    """N renders of all ranks, of which this rank has H.

    ids, weight: `[N]` of all renders, the same on every rank; see `Samples`. rows: `[H]` int64, increasing: which of
    them are here. held: these, in the same order; their own weights are not read. An index picks rows as from
    `Samples`, also one row several times, and moves nothing.
    """

    ids: Tensor
    weight: Tensor
    rows: Tensor
    held: Samples

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Tensor | slice) -> Scattered:
        picked = torch.arange(len(self), device=self.ids.device)[index]
        place = torch.full_like(self.ids, -1)
        place[self.rows] = torch.arange(len(self.rows), device=self.ids.device)
        here = place[picked]
        rows = (here >= 0).nonzero().flatten()
        return Scattered(self.ids[picked], self.weight[picked], rows, self.held[here[rows]])

    @property
    def samples(self) -> Samples:
        """What is here, with the weights that all ranks agreed on."""
        return replace(self.held, weight=self.weight[self.rows])

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Samples.shape`."""
        return self.held.shape

    def detached(self) -> Scattered:
        """See `Samples.detached`."""
        return replace(self, held=self.held.detached())

    def to(self, device: torch.device | str) -> Scattered:
        """See `Samples.to`."""
        return Scattered(self.ids.to(device), self.weight.to(device), self.rows.to(device), held=self.held.to(device))

    @staticmethod
    def cat(parts: Sequence[Scattered]) -> Scattered:
        """See `Samples.cat`."""
        starts = [sum(len(part) for part in parts[:index]) for index in range(len(parts))]
        return Scattered(
            torch.cat([part.ids for part in parts]),
            torch.cat([part.weight for part in parts]),
            torch.cat([part.rows + start for part, start in zip(parts, starts, strict=True)]),
            Samples.cat([part.held for part in parts]),
        )


Renders: TypeAlias = Samples | Scattered
"""The renders of all ranks, whole on every rank or scattered; one kind for a whole run."""


def joined(parts: Sequence[Renders]) -> Renders:
    """The rows of all parts, which are of one kind, in order; at least one part."""
    scattered = [part for part in parts if isinstance(part, Scattered)]
    if scattered:
        return Scattered.cat(scattered)
    return Samples.cat([part for part in parts if isinstance(part, Samples)])
