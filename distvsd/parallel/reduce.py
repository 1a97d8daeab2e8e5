"""The sum of score gradients over micro-batches and ranks: one flat all-reduce, which also carries the loss sums.

"fast" adds in float32; its last bits depend on which rank has which micro-batch. "exact" adds integers, which is
associative: for the same micro-batches the bits are the same for every world size.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distvsd.faults import fault, poison
from distvsd.parallel.collectives import all_reduce_sum_
from distvsd.parallel.world import World


class Flag(enum.IntFlag):
    """Why a sum cannot be used."""

    NONFINITE = 1
    OVERFLOW = 2


# Exact mode holds x as two int64 words: round(x 2^30), and round(r 2^80) of the remainder r. With |x| < 2^20 the first
# is below 2^50 and the second at most 2^49, so 2^13 addends cannot overflow 63 bits. x is kept to 2^-81, which is every
# bit of a float32 larger than 2^-57. A single word would lose either the range or the small elements of a gradient.
COARSE_BITS = 30
FINE_BITS = 80
LIMIT = 2.0**20
MAX_ADDENDS = 2**13 - 1


@dataclass(frozen=True)
class Reduced:
    """The result, the same bits on every rank.

    gradient: `[G]` float32, on the vectors' device. flags: the union of all ranks' flags. sums: `[k]` float64 on the
    CPU; in fast mode with float32's precision. If `usable` is false, gradient and sums are meaningless.
    """

    gradient: Tensor
    flags: Flag
    sums: Tensor

    @property
    def usable(self) -> bool:
        """False if anything was not finite or, in exact mode, too large: skip the step."""
        return not self.flags


def reduce_gradients(
    world: World,
    vectors: Iterable[Tensor],
    length: int,
    numerics: Literal["fast", "exact"],
    extra_sums: Tensor,
) -> Reduced:
    """Sums gradient vectors over this rank's micro-batches and all ranks; one collective, called by every rank.

    vectors: `[G]` float32 each, on the world's device; empty on a rank without micro-batches. Each is taken after the
    one before was added. length: G. extra_sums: `[k]` or `[m, k]` (loss sums, counts); rows are added in float64. They
    are read after the last vector, so computing a vector may fill them in. In exact mode give one row per micro-batch,
    so that nothing was added before. Exact mode takes magnitudes below 2^20 and at most 8191 micro-batches over all
    ranks; beyond that every rank gets `Flag.OVERFLOW`.
    """
    fault("reduce")
    vectors = (poison("reduce", vector) for vector in vectors)
    match numerics:
        case "fast":
            return _reduce_fast(world, vectors, length, extra_sums)
        case "exact":
            return _reduce_exact(world, vectors, length, extra_sums)
    raise ValueError(f"numerics is {numerics!r}; known are 'fast' and 'exact'")


def _reduce_fast(world: World, vectors: Iterable[Tensor], length: int, extra_sums: Tensor) -> Reduced:
    """One float32 buffer: gradient and sums."""
    total = torch.zeros(length, device=world.device)
    for vector in vectors:
        total += _checked(vector, length)
    rows = _rows(extra_sums, world.device)
    packed = all_reduce_sum_(world, torch.cat((total, rows.sum(0).float())))
    gradient, sums = torch.split(packed, [length, rows.shape[1]])
    # The result has the same bits on every rank, and a sum with a non-finite addend is never finite. So every rank
    # finds the same answer by looking at the result.
    sums, nonfinite = _to_host(sums, ~packed.isfinite().all()[None])
    return Reduced(gradient, Flag.NONFINITE if nonfinite else Flag(0), sums)


def _reduce_exact(world: World, vectors: Iterable[Tensor], length: int, extra_sums: Tensor) -> Reduced:
    """One int64 buffer: both words of gradient and sums, the counts of what did not fit, the number of addends."""
    gradient = _FixedPoint(length, world.device)
    for vector in vectors:
        gradient.add(_checked(vector, length))
    rows = _rows(extra_sums, world.device)
    sums = _FixedPoint(rows.shape[1], world.device)
    for row in rows:
        sums.add(row)
    addends = gradient.words.new_tensor(max(gradient.addends, sums.addends))
    counts = torch.stack([gradient.nonfinite + sums.nonfinite, gradient.too_large + sums.too_large, addends])
    packed = all_reduce_sum_(world, torch.cat((gradient.words.flatten(), sums.words.flatten(), counts)))
    gradient_words, sums_words, counts = torch.split(packed, [2 * length, 2 * rows.shape[1], len(counts)])
    total, counts = _to_host(_value(sums_words), counts)
    nonfinite, too_large, added = counts.tolist()
    flags = Flag.NONFINITE if nonfinite else Flag(0)
    if too_large or added > MAX_ADDENDS:
        flags |= Flag.OVERFLOW
    return Reduced(_value(gradient_words).float(), flags, total)


class _FixedPoint:
    """A sum of vectors in fixed point, `words` `[2, n]` int64. Elements that do not fit are left out and counted."""

    def __init__(self, length: int, device: torch.device) -> None:
        self.words = torch.zeros(2, length, dtype=torch.int64, device=device)
        self.nonfinite = torch.zeros((), dtype=torch.int64, device=device)
        self.too_large = torch.zeros((), dtype=torch.int64, device=device)
        self.addends = 0

    def add(self, vector: Tensor) -> None:
        wide = vector.double()
        finite, fits = wide.isfinite(), wide.abs() < LIMIT
        self.nonfinite += (~finite).any()
        self.too_large += (finite & ~fits).any()
        self.addends += 1
        wide = wide.where(fits, 0.0)
        coarse = (wide * 2.0**COARSE_BITS).round()
        rest = wide - coarse * 2.0**-COARSE_BITS  # exact: the rest is a multiple of the last bit of `wide`
        self.words[0] += coarse.long()
        self.words[1] += (rest * 2.0**FINE_BITS).round().long()


def _rows(extra_sums: Tensor, device: torch.device) -> Tensor:
    return extra_sums.to(device, torch.float64).reshape(-1, extra_sums.shape[-1])


def _value(words: Tensor) -> Tensor:
    """Two words `[2 n]` back to float64 `[n]`."""
    wide = words.reshape(2, -1).double()
    return wide[0] * 2.0**-COARSE_BITS + wide[1] * 2.0**-FINE_BITS


def _checked(vector: Tensor, length: int) -> Tensor:
    if vector.shape != (length,) or vector.dtype != torch.float32:
        raise ValueError(f"a gradient is {list(vector.shape)} {vector.dtype}; it must be [{length}] torch.float32")
    return vector.detach()


def _to_host(*parts: Tensor) -> tuple[Tensor, ...]:
    """Small vectors as float64 on the CPU, in one transfer."""
    return torch.split(torch.cat([part.double() for part in parts]).cpu(), [len(part) for part in parts])
