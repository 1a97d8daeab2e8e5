"""One round of the score network: K steps on the renders of all ranks, each rank on its slice.

The batch, its noise and its timesteps are keyed by position in the union of the ranks' samples, so they do not depend
on how many ranks there are. This file does not know how ranks talk: the reduction is handed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from distvsd.score.lora import LoraScore
from distvsd.score.replay import on_policy_lag
from distvsd.vsd.objectives import draw_timesteps
from distvsd.vsd.rng import Purpose, normal, uniform
from distvsd.vsd.samples import Samples


class Reduced(Protocol):
    """What a reduction over ranks gives back: the summed gradient `[G]`, the summed numbers, and whether both are
    sound."""

    @property
    def gradient(self) -> Tensor: ...
    @property
    def sums(self) -> Tensor: ...
    @property
    def usable(self) -> bool: ...


Reduce = Callable[[Sequence[Tensor], int, Tensor], Reduced]
"""(gradients of this rank's micro-batches, flag bits, float64 rows to sum) -> Reduced. Collective."""

LAG_SAMPLES = 64  # of the union, in which the lag is measured: enough to see it, and its cost does not grow


class TrainingOptions(Protocol):
    """What is read of the configuration's `score` block; meanings and ranges are documented there."""

    @property
    def steps_per_round(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def learning_rate_scaling(self) -> str: ...
    @property
    def camera_drop(self) -> float: ...
    @property
    def replay_share(self) -> float: ...


@dataclass(frozen=True)
class Fit:
    """loss: mean score loss of the round's steps. skipped: steps left out on all ranks because a gradient was not
    finite."""

    loss: float
    skipped: int


@dataclass(frozen=True)
class ScoreTraining:
    """Trains the shared score network; every rank calls `round` with the same union.

    reduce: the collective sum. slice_of(n): this rank's share of n rows. micro_batch: rows a backward pass, 0 for all;
    1 makes the sum independent of the number of ranks to the last bit, with an exact reduction.
    """

    score: LoraScore
    reduce: Reduce
    slice_of: Callable[[int], slice]
    options: TrainingOptions
    seed: int
    micro_batch: int

    def round(self, union: Samples, step: int) -> Fit:
        """K optimiser steps, t uniform over the whole range, then the union joins the replay. Communicates K times."""
        losses, skipped = [], 0
        for lane in range(self.options.steps_per_round):
            batch = self._batch(union, step, lane)
            valid = float(batch.weight.sum())
            if valid == 0:
                skipped += 1
                continue
            mine = self.slice_of(len(batch))
            rows = torch.arange(len(batch), device=batch.ids.device)[mine]
            u = uniform(self.seed, Purpose.SCORE_TIMESTEP, rows, step, (), lane)
            noise = normal(self.seed, Purpose.SCORE_NOISE, rows, step, tuple(batch.latents.shape[1:]), lane)
            keep = uniform(self.seed, Purpose.SCORE_CAMERA_DROP, rows, step, (), lane) >= self.options.camera_drop
            vectors, row_losses = self.score.gradients(
                batch[mine],
                draw_timesteps(u, 0.0, 1.0, self.score.num_timesteps),
                noise,
                keep,
                valid,
                self._micro_batches(len(rows)),
            )
            reduced = self.reduce(vectors, 0, row_losses.double()[:, None])
            if not reduced.usable:
                skipped += 1
                continue
            self.score.step(reduced.gradient, self._rate(len(batch)))
            losses.append(float(reduced.sums[0]) / valid)
        self.score.replay.push(union, step)
        return Fit(sum(losses) / len(losses) if losses else math.nan, skipped)

    def lag(self, union: Samples, step: int) -> float | None:
        """Score loss on these renders minus that on the oldest kept ones; None while nothing older is kept. Local.

        Every rank computes the same number from the same first samples of the union; call it before `round`.
        """
        old = self.score.replay.oldest()
        if old is None:
            return None
        return on_policy_lag(self.score, union[:LAG_SAMPLES], old[:LAG_SAMPLES], self.seed, step)

    def _batch(self, union: Samples, step: int, lane: int) -> Samples:
        extra = round(len(union) * self.options.replay_share / (1 - self.options.replay_share))
        old = self.score.replay.oldest()
        # After a change of resolution the kept renders do not fit; they are dropped when this union is pushed.
        if extra == 0 or old is None or old.latents.shape[1:] != union.latents.shape[1:]:
            return union
        return Samples.cat([union, self.score.replay.draw(extra, self.seed, step, lane)])

    def _rate(self, batch_size: int) -> float:
        match self.options.learning_rate_scaling:
            case "sqrt":
                return self.options.learning_rate * math.sqrt(batch_size)
            case "linear":
                return self.options.learning_rate * batch_size
        return self.options.learning_rate

    def _micro_batches(self, count: int) -> list[slice]:
        size = self.micro_batch or max(count, 1)
        return [slice(first, min(first + size, count)) for first in range(0, count, size)]
