"""Samples on their way between ranks: gathered by all in one order, moved from rank to rank, or made whole.

A batch is any dataclass of tensors with one row a sample, `ids` among them. Its fields travel side by side in one
buffer of 32-bit words `[max_rows, F]`. They are reinterpreted and never converted, so every bit survives: the payload
of a NaN, the value of an int64 id. The assignment says how many rows each rank gives, so no size is exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from distvsd.faults import fault
from distvsd.parallel.assign import share
from distvsd.parallel.collectives import GatheredRows, all_gather_rows, all_reduce_sum_, all_to_all_rows
from distvsd.parallel.world import World


class Batch(Protocol):
    """A dataclass of tensors of 4-byte or 8-byte numbers, all with the same number of rows, on one device."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def ids(self) -> Tensor:
        """`[N]` particle ids, by which the union is ordered."""

    @property
    def weight(self) -> Tensor:
        """`[N]` float32, 0 for a row that counts for nothing."""


B = TypeVar("B", bound=Batch)


class Exchange:
    """The exchange under one assignment.

    rows: how many samples each rank gives in every call, by rank; the same list on every rank.
    """

    def __init__(self, world: World, rows: Sequence[int]) -> None:
        if len(rows) != world.size or min(rows) < 0:
            raise ValueError(f"rows is {list(rows)}; need one count >= 0 for each of {world.size} ranks")
        self._world = world
        self._rows = list(rows)

    def start(self, samples: B) -> Pending[B]:
        """Starts the gather: asynchronous, one collective, called by every rank. The result has no graph.

        A rank without particles takes part with zero rows of the right shape, latents `[0, C, h, w]`. The shape of one
        row must be the same on every rank; it may change between calls.
        """
        fault("exchange")
        samples = replace(samples, **{name: column.detach() for name, column in _columns(samples).items()})
        expected = self._rows[self._world.rank]
        lengths = {name: len(column) for name, column in _columns(samples).items()}
        if set(lengths.values()) != {expected}:
            raise ValueError(f"rank {self._world.rank} gives {lengths} rows; its assignment says {expected}")
        words = _packed(samples)
        padded = torch.nn.functional.pad(words, (0, 0, 0, max(self._rows) - expected))
        return Pending(samples, all_gather_rows(self._world, padded), self._rows)


class Pending(Generic[B]):
    """Samples that are being gathered."""

    def __init__(self, samples: B, gathered: GatheredRows, rows: list[int]) -> None:
        self._template = samples
        self._gathered = gathered
        self._rows = rows
        self._union: B | None = None

    @property
    def sent(self) -> int:
        """Bytes that this rank sends: its padded rows to every other rank, whether one by one or in a ring."""
        words = sum(_num_words(column) for column in _columns(self._template).values())
        return 4 * words * max(self._rows) * (len(self._rows) - 1)

    def wait(self) -> B:
        """The samples of all ranks, sorted by particle id; the rows of one particle keep their order.

        So the result is the same for every world size. Later calls return the same object.
        """
        if self._union is None:
            words = torch.cat([part[:count] for part, count in zip(self._gathered.wait(), self._rows, strict=True)])
            union = _unpacked(words, self._template)
            order = union.ids.argsort(stable=True)
            self._union = replace(union, **{name: column[order] for name, column in _columns(union).items()})
        return self._union


def move(world: World, batch: B, give: Sequence[int], take: Sequence[int]) -> B:
    """Sends the rows of `batch`, give[r] of them to rank r in order; returns those of all ranks, take[r] from rank r.
    One collective, called by every rank; the bits are unchanged. give[r] on rank s must be take[s] on rank r."""
    return _unpacked(all_to_all_rows(world, _packed(batch), give, take), batch)


def complete(world: World, batch: B, rows: Tensor, total: int) -> tuple[B, int]:
    """A batch of `total` rows on every rank, of which each rank has some: `batch`, whose places are `rows`; and the
    bytes that this rank sends. One collective, called by every rank.

    Every row must come from exactly one rank. It is a sum of integers in which the other ranks have zeros, so every bit
    survives, and a ring sends it in constant time for any number of ranks.
    """
    words = _packed(batch)
    whole = words.new_zeros(total, words.shape[1])
    whole[rows] = words
    return _unpacked(all_reduce_sum_(world, whole), batch), summed_bytes(world, whole)


def summed_bytes(world: World, tensor: Tensor) -> int:
    """Bytes that a rank sends in the sum of such tensors over ranks: in a ring every part goes round twice."""
    return 2 * (world.size - 1) * tensor.nbytes // world.size


def exclude(world: World, union: B, absent: list[int]) -> B:
    """The union with weight 0 for the particles that any rank reports absent; one small sum over ranks, collective."""
    rows = torch.isin(union.ids, torch.tensor(absent, dtype=torch.int64, device=union.ids.device))
    missed = all_reduce_sum_(world, rows.float())
    return replace(union, weight=union.weight * (missed == 0))


def slice_for(world: World, total: int) -> slice:
    """This rank's share of `total` particles to train on: contiguous, balanced, empty if there are too few."""
    own = share(total, world.size, world.rank)
    return slice(own.start, own.stop)


def _columns(samples: Batch) -> dict[str, Tensor]:
    return {field.name: getattr(samples, field.name) for field in fields(samples)}


def _packed(batch: Batch) -> Tensor:
    """All columns side by side, int32 words `[N, words]`."""
    return torch.cat([_to_words(column) for column in _columns(batch).values()], dim=1)


def _unpacked(words: Tensor, template: B) -> B:
    """Inverse of `_packed`; template: a batch of any number of rows with the same columns."""
    columns = _columns(template)
    parts = torch.split(words, [_num_words(column) for column in columns.values()], dim=1)
    taken = {
        name: _fresh(part).view(column.dtype).reshape(-1, *column.shape[1:])
        for (name, column), part in zip(columns.items(), parts, strict=True)
    }
    return replace(template, **taken)


def _to_words(column: Tensor) -> Tensor:
    """`[N, ...]` as int32 words `[N, words]`, the bits unchanged."""
    return _fresh(column.reshape(len(column), math.prod(column.shape[1:]))).view(torch.int32)


def _fresh(tensor: Tensor) -> Tensor:
    """A copy with plain strides and offset 0, which a view as another dtype needs. `contiguous` does not copy single
    rows."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _num_words(column: Tensor) -> int:
    return math.prod(column.shape[1:]) * column.element_size() // 4
