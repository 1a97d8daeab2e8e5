"""One round of the score network: K steps on the renders of all ranks, each rank on its part.

Times and noise of a render are keyed by (particle, view, round), so they depend neither on how many ranks there are nor
on where in a batch the render is. The communication is left to a strategy and to a way of sharing renders, which are
passed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distvsd.config import ScoreConfig
from distvsd.errors import DivergedError
from distvsd.score.base import StepResult, Strategy
from distvsd.score.lora import LoraScore
from distvsd.score.replay import Replay, on_policy_lag
from distvsd.score.scattered import Renders, joined
from distvsd.score.sharing import Sharing
from distvsd.score.stored import OPTIMIZER_FILE, REPLAY_FILE
from distvsd.score.work import Batch, Work
from distvsd.vsd.rng import Purpose, normal, uniform
from distvsd.vsd.samples import Samples, slices

LAG_SAMPLES = 64  # of the union, on which the lag is measured; fixed, so that its cost does not grow
NAMED_ROWS = 8  # in an error message


@dataclass(frozen=True)
class Fit:
    """loss: mean score loss of the round's steps. skipped: steps left out on all ranks because a gradient was not
    finite, or because no sample of any rank was valid."""

    loss: float
    skipped: int


def kept_rows(samples: int, replay_share: float, num_views: int) -> int:
    """Rows of a round of `samples` renders that the replay keeps at most: whole particles of `num_views` rows."""
    return samples if replay_share > 0 else min(samples, max(LAG_SAMPLES // num_views, 1) * num_views)


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(kw_only=True)
class ScoreTraining:
    """Trains the shared score network; every rank calls `round` with the same union, whole or scattered.

    strategy: how the ranks' parts become one step. sharing: which part is this rank's. num_particles, num_views: of the
    run; the rows of a particle are adjacent in every batch. micro_batch: rows per backward pass, 0
    for all. With one particle per pass its gradient is independent of its neighbours, which `numerics: exact` needs
    beside an exact reduction. gather(value): every rank's JSON-able value, by rank; collective, called only before
    DivergedError, to name the cause.

    replay: recent renders of all ranks. left_out: how many of the latest optimiser steps all ranks left out, in a row.
    """

    score: LoraScore
    strategy: Strategy
    sharing: Sharing
    config: ScoreConfig
    seed: int
    num_particles: int
    num_views: int
    micro_batch: int
    replay: Replay
    gather: Callable[[Any], list[Any]] = _alone
    left_out: int = field(default=0, init=False)

    def round(self, union: Renders, step: int) -> Fit:
        """K optimiser steps, t uniform over the whole range, then the union joins the replay. Communicates in every
        step.

        Raises DivergedError, on all ranks, when `max_skipped` steps in a row had to be left out.
        """
        union = self._kept(union)
        losses, skipped = [], 0
        for lane in range(self.config.steps_per_round):
            loss = self._step(*self._batch(union, step, lane), step, lane)
            if loss is None:
                skipped += 1
            else:
                losses.append(loss)
        self.replay.push(self._worth_keeping(union), step)
        return Fit(sum(losses) / len(losses) if losses else math.nan, skipped)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Everything a bit-for-bit resume needs: tensors by name by file name; copies, on the CPU.

        Collective where the strategy keeps parts of the optimiser, or the sharing of renders parts of the replay, on
        every rank.
        """
        files = self.score.state(self.strategy.optimizer)
        files[OPTIMIZER_FILE]["left_out"] = torch.tensor(self.left_out, dtype=torch.int64)
        return files | {REPLAY_FILE: self.replay.state(self.sharing.whole)}

    def load_state(self, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Inverse of `state`; raises CheckpointError where a file or tensor is missing or has another shape."""
        self.replay.check(files.get(REPLAY_FILE, {}))
        self.score.load_state(files, self.strategy.optimizer)
        self.replay.load_state(files[REPLAY_FILE], self.sharing.keep)
        self.left_out = int(files[OPTIMIZER_FILE].get("left_out", 0))

    def lag(self, union: Renders, step: int) -> float | None:
        """Score loss on these renders minus that on the oldest kept ones; None while nothing older is kept.

        Every rank computes the same number from the same first samples of the union; call it before `round`.
        Communicates where renders are scattered, or where a strategy has spread the network over ranks.
        """
        old = self.replay.oldest()
        if old is None:
            return None
        first = slice(0, kept_rows(len(union), 0.0, self.num_views))
        current, before = (self.sharing.whole(renders[first]) for renders in (self._kept(union), old))
        with self.strategy.calling():
            return on_policy_lag(self.score, current, before, self.seed, step)

    def _kept(self, union: Renders) -> Renders:
        """A union that every rank has whole is cut to what `sharing` keeps of it here, so that all renders are of one
        kind."""
        return self.sharing.keep(union) if isinstance(union, Samples) else union

    def _step(self, union: Renders, keys: Tensor, step: int, lane: int) -> float | None:
        """One optimiser step and its mean loss, or None where all ranks leave it out together."""
        valid = float(union.weight.sum())
        if valid == 0:
            self._leave_out(step, None, None)
            return None
        batch = self._draw(union, keys, step, lane).never_empty(self.num_views)
        work = Work(self.score, batch, valid, slices(len(batch.samples), self.micro_batch, self.num_views))
        result = self.strategy.step(work, self._rate(len(union)))
        if not result.taken:
            self._leave_out(step, batch, result)
            return None
        self.left_out = 0
        return result.loss / valid

    def _draw(self, union: Renders, keys: Tensor, step: int, lane: int) -> Batch:
        """This rank's part of the step's rows, with the draws of their keys `[N]`."""
        mine, samples = self.sharing.part(union, self.num_views)
        own = keys[mine]
        return Batch(
            samples,
            self.score.process.times(uniform(self.seed, Purpose.SCORE_TIMESTEP, own, step, (), lane), 0.0, 1.0),
            normal(self.seed, Purpose.SCORE_NOISE, own, step, union.shape, lane),
            uniform(self.seed, Purpose.SCORE_CAMERA_DROP, own, step, (), lane) >= self.config.camera_drop,
        )

    def _batch(self, union: Renders, step: int, lane: int) -> tuple[Renders, Tensor]:
        """What step `lane` of the round trains on, its share of the union and of the replay; and the keys of its draws.

        A fresh row has the key particle * V + view; replayed rows have the keys after all of those.
        """
        fresh = self._dealt(union, step, lane)
        keys = fresh.ids * self.num_views + torch.arange(len(fresh), device=fresh.ids.device) % self.num_views
        extra = self.config.replayed(len(fresh) // self.num_views)
        old = self.replay.oldest()
        # After a change of resolution the kept renders do not fit; they are dropped when this union is pushed.
        if extra == 0 or old is None or old.shape != union.shape:
            return fresh, keys
        replayed = self.replay.draw(extra, self.seed, step, lane)
        after = self.num_particles * self.num_views + torch.arange(len(replayed), device=keys.device)
        return joined([fresh, replayed]), torch.cat((keys, after))

    def _dealt(self, union: Renders, step: int, lane: int) -> Renders:
        """Whole particles with about `batch_size` sound renders. Each step goes on in the round's random order where
        the previous step ended, and wraps around."""
        views = self.num_views
        size = self.config.batch_size
        if size == 0:
            return union
        sound = union[union.weight > 0]  # a step of masked ones only would train nothing
        count = len(sound) // views
        wanted = self.config.fresh(count, views)
        if wanted == count:
            return sound
        order = uniform(self.seed, Purpose.SCORE_BATCH, sound.ids[::views], step, ()).argsort(stable=True)
        dealt = order[(lane * wanted + torch.arange(wanted, device=order.device)) % count]
        return sound[(dealt[:, None] * views + torch.arange(views, device=order.device)).flatten()]

    def _worth_keeping(self, union: Renders) -> Renders:
        """The valid renders that the replay keeps: few without a replayed share, where only the lag reads them."""
        return union[union.weight > 0][: kept_rows(len(union), self.config.replay_share, self.num_views)]

    def _rate(self, batch_size: int) -> float:
        match self.config.learning_rate_scaling:
            case "sqrt":
                return self.config.learning_rate * math.sqrt(batch_size)
            case "linear":
                return self.config.learning_rate * batch_size
        return self.config.learning_rate

    def _leave_out(self, step: int, batch: Batch | None, result: StepResult | None) -> None:
        """Counts a step that was left out. At `max_skipped` it communicates, and raises on all ranks."""
        self.left_out += 1
        if self.left_out < self.config.max_skipped:
            return
        if batch is None or result is None:
            cause = "no render of any particle was finite"
        else:
            bad = ~result.rows.isfinite()
            rows = [[int(i), t] for i, t in zip(batch.samples.ids[bad], batch.times[bad].tolist(), strict=True)]
            cause = _cause(self.gather([rows, result.finite]))
        raise DivergedError(
            f"the score network's last {self.left_out} optimiser steps were left out (score.max_skipped), up to "
            f"round {step + 1}: {cause}. These steps changed no weights; resume with a lower score.learning_rate, "
            "with score.max_grad_norm, or from an older checkpoint"
        )


def _cause(reports: list[list[Any]]) -> str:
    """What was not finite, from each rank's [[particle, timestep] of rows, whether its gradient was finite or None]."""
    rows = sorted(tuple(row) for report in reports for row in report[0])
    if rows:
        named = ", ".join(f"particle {particle} at timestep {timestep}" for particle, timestep in rows[:NAMED_ROWS])
        more = f" and {len(rows) - NAMED_ROWS} more rows" if len(rows) > NAMED_ROWS else ""
        return f"the loss was not finite for {named}{more}"
    if reports[0][1] is None:
        return "every loss was finite, but the sum of the ranks' gradients was not"
    ranks = [str(rank) for rank, (_, sound) in enumerate(reports) if not sound]
    if ranks:
        return f"every loss was finite, but the gradient was not on rank {', '.join(ranks)}"
    return "every rank's loss and gradient were finite, but their sum over ranks was not or was too large"
