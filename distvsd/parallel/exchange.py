"""The gather of samples: every rank gives the rows of its own particles and gets the rows of all, in one order.

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
from distvsd.parallel.collectives import GatheredRows, all_gather_rows, all_reduce_sum_
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
        words = torch.cat([_to_words(column) for column in _columns(samples).values()], dim=1)
        padded = torch.nn.functional.pad(words, (0, 0, 0, max(self._rows) - expected))
        return Pending(samples, all_gather_rows(self._world, padded), self._rows)


class Pending(Generic[B]):
    """Samples that are being gathered."""

    def __init__(self, samples: B, gathered: GatheredRows, rows: list[int]) -> None:
        self._template = samples
        self._gathered = gathered
        self._rows = rows
        self._union: B | None = None

    def wait(self) -> B:
        """The samples of all ranks, sorted by particle id; the rows of one particle keep their order.

        So the result is the same for every world size. Later calls return the same object.
        """
        if self._union is None:
            words = torch.cat([part[:count] for part, count in zip(self._gathered.wait(), self._rows, strict=True)])
            columns = _columns(self._template)
            parts = torch.split(words, [_num_words(column) for column in columns.values()], dim=1)
            union = {
                name: _fresh(part).view(column.dtype).reshape(-1, *column.shape[1:])
                for (name, column), part in zip(columns.items(), parts, strict=True)
            }
            order = union["ids"].argsort(stable=True)
            self._union = replace(self._template, **{name: column[order] for name, column in union.items()})
        return self._union


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


def _to_words(column: Tensor) -> Tensor:
    """`[N, ...]` as int32 words `[N, words]`, the bits unchanged."""
    return _fresh(column.reshape(len(column), math.prod(column.shape[1:]))).view(torch.int32)


def _fresh(tensor: Tensor) -> Tensor:
    """A copy with plain strides and offset 0, which a view as another dtype needs. `contiguous` does not copy single
    rows."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _num_words(column: Tensor) -> int:
    return math.prod(column.shape[1:]) * column.element_size() // 4
