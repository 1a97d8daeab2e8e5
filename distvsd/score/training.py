"""One round of the score network: K steps on the renders of all ranks, each rank on its slice.

The batch, its noise and its timesteps are keyed by position in the union of the ranks' samples, so they do not depend
on how many ranks there are. This file does not know how ranks talk: the strategy is handed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from distvsd.errors import DivergedError
from distvsd.score.base import Strategy, Taken
from distvsd.score.lora import LoraScore
from distvsd.score.replay import on_policy_lag
from distvsd.score.work import Draws, Work
from distvsd.vsd.objectives import draw_timesteps
from distvsd.vsd.rng import Purpose, normal, uniform
from distvsd.vsd.samples import Samples, slices

LAG_SAMPLES = 64  # of the union, in which the lag is measured: enough to see it, and its cost does not grow
NAMED_ROWS = 8  # in an error message


class TrainingOptions(Protocol):
    """What is read of the configuration's `score` block; meanings and ranges are documented there."""

    @property
    def steps_per_round(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def learning_rate_scaling(self) -> str: ...
    @property
    def camera_drop(self) -> float: ...
    @property
    def replay_share(self) -> float: ...
    @property
    def max_skipped(self) -> int: ...


@dataclass(frozen=True)
class Fit:
    """loss: mean score loss of the round's steps. skipped: steps left out on all ranks because a gradient was not
    finite, or because no sample of any rank was valid."""

    loss: float
    skipped: int


def kept_rows(samples: int, replay_share: float) -> int:
    """Rows of a round of `samples` renders that the replay keeps at most."""
    return samples if replay_share > 0 else min(samples, LAG_SAMPLES)


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass
class ScoreTraining:
    """Trains the shared score network; every rank calls `round` with the same union.

    strategy: how the ranks' parts become one step. slice_of(n): this rank's share of n rows. micro_batch: rows a
    backward pass, 0 for all; one makes a row's gradient independent of its neighbours, which `numerics: exact` needs
    with an exact reduction. gather(value): every rank's JSON-able value, by rank; collective, called only before the
    error that names what went wrong.
    """

    score: LoraScore
    strategy: Strategy
    slice_of: Callable[[int], slice]
    options: TrainingOptions
    seed: int
    micro_batch: int
    gather: Callable[[Any], list[Any]] = _alone

    def round(self, union: Samples, step: int) -> Fit:
        """K optimiser steps, t uniform over the whole range, then the union joins the replay. Communicates K times.

        Raises DivergedError, on all ranks, when `max_skipped` steps in a row had to be left out.
        """
        losses, skipped = [], 0
        for lane in range(self.options.steps_per_round):
            loss = self._step(self._batch(union, step, lane), step, lane)
            if loss is None:
                skipped += 1
            else:
                losses.append(loss)
        self.score.replay.push(self._worth_keeping(union), step)
        return Fit(sum(losses) / len(losses) if losses else math.nan, skipped)

    def _step(self, batch: Samples, step: int, lane: int) -> float | None:
        """One optimiser step and its mean loss, or None where all ranks leave it out together."""
        valid = float(batch.weight.sum())
        if valid == 0:
            self._leave_out(step, None, None)
            return None
        draws = self._draw(batch, step, lane).never_empty()
        work = Work(self.score, draws, valid, slices(len(draws.samples), self.micro_batch))
        taken = self.strategy.step(work, self._rate(len(batch)))
        if not taken.usable:
            self._leave_out(step, draws, taken)
            return None
        self.score.left_out = 0
        return taken.loss / valid

    def _draw(self, batch: Samples, step: int, lane: int) -> Draws:
        """This rank's share; the draws are keyed by position in the whole batch."""
        mine = self.slice_of(len(batch))
        rows = torch.arange(len(batch), device=batch.ids.device)[mine]
        u = uniform(self.seed, Purpose.SCORE_TIMESTEP, rows, step, (), lane)
        return Draws(
            batch[mine],
            draw_timesteps(u, 0.0, 1.0, self.score.num_timesteps),
            normal(self.seed, Purpose.SCORE_NOISE, rows, step, tuple(batch.latents.shape[1:]), lane),
            uniform(self.seed, Purpose.SCORE_CAMERA_DROP, rows, step, (), lane) >= self.options.camera_drop,
        )

    def _leave_out(self, step: int, draws: Draws | None, taken: Taken | None) -> None:
        """Counts a step that was left out; the last that may be communicates, and raises on all ranks."""
        self.score.left_out += 1
        if self.score.left_out < self.options.max_skipped:
            return
        if draws is None or taken is None:
            cause = "no render of any particle was finite"
        else:
            bad = ~taken.rows.isfinite()
            rows = torch.stack([draws.samples.ids[bad], draws.timesteps[bad]], 1).tolist()
            cause = _cause(self.gather([rows, taken.sound]))
        raise DivergedError(
            f"the score network's last {self.score.left_out} optimiser steps were left out (score.max_skipped), up to "
            f"round {step + 1}: {cause}. Its weights are those of before; resume with a lower score.learning_rate, "
            "with score.max_grad_norm, or from an older checkpoint"
        )

    def _worth_keeping(self, union: Samples) -> Samples:
        """Without a replayed share only the lag looks at kept renders, and it looks at so many of a round."""
        return union[union.weight > 0][: kept_rows(len(union), self.options.replay_share)]

    def lag(self, union: Samples, step: int) -> float | None:
        """Score loss on these renders minus that on the oldest kept ones; None while nothing older is kept. Local.

        Every rank computes the same number from the same first samples of the union; call it before `round`.
        """
        old = self.score.replay.oldest()
        if old is None:
            return None
        with self.strategy.calling():
            return on_policy_lag(self.score, union[:LAG_SAMPLES], old[:LAG_SAMPLES], self.seed, step)

    def _batch(self, union: Samples, step: int, lane: int) -> Samples:
        """What step `lane` of the round trains on: its share of the union, and of the replay."""
        fresh = self._dealt(union, step, lane)
        extra = round(len(fresh) * self.options.replay_share / (1 - self.options.replay_share))
        old = self.score.replay.oldest()
        # After a change of resolution the kept renders do not fit; they are dropped when this union is pushed.
        if extra == 0 or old is None or old.latents.shape[1:] != union.latents.shape[1:]:
            return fresh
        return Samples.cat([fresh, self.score.replay.draw(extra, self.seed, step, lane)])

    def _dealt(self, union: Samples, step: int, lane: int) -> Samples:
        """`batch_size` sound renders: in a random order of the round, from where the step before ended, around."""
        size = self.options.batch_size
        if size == 0:
            return union
        sound = union[union.weight > 0]  # masked ones could fill a step that then teaches nothing
        if size >= len(sound):
            return sound
        rows = torch.arange(len(sound), device=union.ids.device)
        order = uniform(self.seed, Purpose.SCORE_BATCH, rows, step, ()).argsort(stable=True)
        return sound[order[(lane * size + rows[:size]) % len(sound)]]

    def _rate(self, batch_size: int) -> float:
        match self.options.learning_rate_scaling:
            case "sqrt":
                return self.options.learning_rate * math.sqrt(batch_size)
            case "linear":
                return self.options.learning_rate * batch_size
        return self.options.learning_rate


def _cause(reports: list[list[Any]]) -> str:
    """What was not finite, from each rank's [[particle, timestep] of rows, whether its gradient was finite or None]."""
    rows = sorted(tuple(row) for report in reports for row in report[0])
    if rows:
        named = ", ".join(f"particle {particle} at timestep {timestep}" for particle, timestep in rows[:NAMED_ROWS])
        more = f" and {len(rows) - NAMED_ROWS} more rows" if len(rows) > NAMED_ROWS else ""
        return f"the loss was not finite for {named}{more}"
    if reports[0][1] is None:
        return "every loss was finite, the sum of the ranks' gradients was not"
    ranks = [str(rank) for rank, (_, sound) in enumerate(reports) if not sound]
    if ranks:
        return f"every loss was finite, the gradient was not on rank {', '.join(ranks)}"
    return "every rank's loss and gradient were finite, their sum over ranks was not or was too large"
