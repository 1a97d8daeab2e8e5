"""Counter-based random streams, keyed by (seed, particle, step, purpose) and never by rank.

A number is a pure function of its key and of its index: it does not depend on how many ranks there are, on which
rank draws it, on what was drawn before, nor on which other particles are drawn in the same call. The generator is
Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), vectorised over particles.

This is the only file that seeds anything.
"""

from __future__ import annotations

import enum
import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


class Purpose(enum.IntEnum):
    """What a stream is for. Values are part of the checkpoint contract: append, never renumber."""

    INIT = 0
    CAMERA = 1
    BACKGROUND = 2
    RAY_JITTER = 3
    DENSITY_NOISE = 4
    TIMESTEP = 5
    NOISE = 6
    SCORE_TIMESTEP = 7
    SCORE_NOISE = 8
    SCORE_CAMERA_DROP = 9
    SCORE_INIT = 10
    REPLAY = 11
    LAG = 12
    SAMPLE = 13
    BUILD = 14
    EVALUATE = 15
    SCORE_BATCH = 16
    GROWTH = 17
    OCCUPANCY = 18


def uniform(
    seed: int, purpose: Purpose, particles: Tensor | Sequence[int], step: int, shape: Sequence[int], lane: int = 0
) -> Tensor:
    """Uniform numbers in [0, 1), float32 `[P, *shape]`, one independent stream per particle id.

    particles: `[P]` ids. step: the round. lane: a sub-stream within a step (the k-th score step, say), below 2^24.
    Bit-identical on every device and for every batching of the particles.
    """
    return (_bits(seed, purpose, particles, step, shape, lane) >> 8).to(torch.float32) * 2.0**-24


def normal(
    seed: int, purpose: Purpose, particles: Tensor | Sequence[int], step: int, shape: Sequence[int], lane: int = 0
) -> Tensor:
    """Standard normal numbers, float32 `[P, *shape]`; keys as in `uniform`. Box-Muller, so |x| < 5.8.

    Equal on every machine up to the rounding of log and cos.
    """
    bits = _bits(seed, purpose, particles, step, (2, *shape), lane)
    radius = (((bits[:, 0] >> 8).to(torch.float32) + 0.5) * 2.0**-24).log().mul(-2).sqrt()
    return radius * ((bits[:, 1] >> 8).to(torch.float32) * (2.0**-24 * 2 * math.pi)).cos()


def generator(seed: int, purpose: Purpose, *counters: int) -> torch.Generator:
    """A seeded CPU generator for library code that takes one; the key is hashed, so nearby keys are unrelated."""
    digest = hashlib.blake2b(repr((seed, int(purpose), counters)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") & (2**63 - 1))


@contextmanager
def seeded(seed: int, purpose: Purpose, *counters: int) -> Iterator[None]:
    """Seeds torch's global CPU generator inside the block, for libraries that initialise from it, and restores it
    after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, purpose, *counters).initial_seed())
        yield


def _bits(
    seed: int, purpose: Purpose, particles: Tensor | Sequence[int], step: int, shape: Sequence[int], lane: int
) -> Tensor:
    """Uniform 32-bit words as int64 `[P, *shape]`; counter = (index, particle, step, purpose and lane), key = seed."""
    ids = torch.as_tensor(particles, dtype=torch.int64)
    if not len(ids):
        return ids.new_empty(0, *shape)  # without allocating the index below, which may be large
    count = math.prod(shape)
    blocks = -(-count // 4)
    index = torch.arange(blocks, dtype=torch.int64, device=ids.device).expand(len(ids), blocks)
    words = philox(
        index,
        (ids & _WORD)[:, None].expand_as(index),
        torch.full_like(index, step & _WORD),
        torch.full_like(index, (int(purpose) | lane << 8) & _WORD),
        seed & _WORD,
        (seed >> 32) & _WORD,
    )
    return torch.stack(words, dim=-1).reshape(len(ids), 4 * blocks)[:, :count].reshape(len(ids), *shape)


def philox(a: Tensor, b: Tensor, c: Tensor, d: Tensor, key0: int, key1: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox-4x32 on uint32 words held in int64; a product's high word survives int64 wrap-around."""
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (
            ((second >> 32) & _WORD) ^ b ^ key0,
            second & _WORD,
            ((first >> 32) & _WORD) ^ d ^ key1,
            first & _WORD,
        )
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return a, b, c, d
