"""What each `parallel.exchange` sends, how much its busiest rank trains on, and which one `auto` takes.

Closed formulas of the configuration and the number of ranks. Batches that are dealt or replayed at random have their
expectation. Rounds in which the replay is still empty send less.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, get_args

from distvsd.config import Config
from distvsd.parallel.assign import share
from distvsd.plan.needs import FLOAT_BYTES
from distvsd.score.sharing import Mode
from distvsd.score.training import kept_rows

LABEL_BYTES = 12  # what every rank learns of every render: its id (64 bits) and its weight
SPREAD = 12  # standard deviations, and as many particles, beyond which no count is looked at
SMOOTH = 100.0  # from this variance on a count is taken as normal


def chosen_mode(config: Config, world: int) -> Mode:
    """`parallel.exchange` of the run; for `auto`, of the modes in which the busiest rank trains on the fewest samples,
    the one that sends the fewest renders.

    The samples come first: to train on one takes thousands of times as long as to send it. Local, and the same on every
    rank: a function of the configuration and the number of ranks.
    """
    if config.parallel.exchange != "auto":
        return config.parallel.exchange
    return min(get_args(Mode), key=lambda mode: (_busiest(config, world, mode), _renders(config, world, mode)))


def exchanges(config: Config, world: int, sample: int | None) -> list[dict[str, Any]]:
    """A row for each mode: what its busiest rank trains on a round, in samples, and the bytes that all ranks send.

    sample: bytes of one sample, None where unknown. `round`: in every round. `log`: more in a round that is logged, for
    the lag. `save`: more in a save, for the replay, at most. No rows where no score network is trained.
    """
    if not config.objective.needs_score:
        return []
    chosen = chosen_mode(config, world)
    return [
        {"mode": mode, "trained": _busiest(config, world, mode)}
        | _bytes(config, world, mode, sample)
        | {"chosen": mode == chosen}
        for mode in get_args(Mode)
    ]


def _bytes(config: Config, world: int, mode: Mode, sample: int | None) -> dict[str, int | None]:
    if world == 1:
        return {"round": 0, "log": 0, "save": 0}
    if sample is None:
        return {"round": None, "log": None, "save": None}
    views = config.particles.views
    renders = config.particles.active * views
    most = len(share(config.particles.active, world, 0)) * views
    agreed = world * _summed(FLOAT_BYTES * renders, world)  # which particles did not move
    sent = agreed + round(_renders(config, world, mode) * sample)
    if mode == "all_gather":
        return {"round": sent, "log": 0, "save": 0}
    lagged = kept_rows(renders, 0.0, views) * sample
    replayed = kept_rows(renders, config.score.replay_share, views) * sample
    return {
        "round": sent + world * (world - 1) * most * LABEL_BYTES,
        "log": 2 * world * _summed(lagged, world),
        "save": config.score.replay_rounds * world * _summed(replayed, world),
    }


def _summed(size: int, world: int) -> int:
    """Bytes that a rank sends in a sum of so many over ranks, in a ring."""
    return 2 * (world - 1) * size // world


def _renders(config: Config, world: int, mode: Mode) -> float:
    """Renders that all ranks send in a round."""
    count, views = config.particles.active, config.particles.views
    match mode:
        case "none":
            return 0
        case "all_gather":
            return world * (world - 1) * len(share(count, world, 0)) * views
    most = -(-_batch(config) // world)
    moved = sum(ranks * _Count(config, own).above(most) for ranks, own in _shards(config, world))
    return config.score.steps_per_round * views * moved


def _busiest(config: Config, world: int, mode: Mode) -> int:
    """Samples that the busiest rank trains on in a round; for batches that are drawn at random and stay with their
    owners an estimate, the mean and sqrt(2 ln ranks) standard deviations."""
    batch = _batch(config)
    most = -(-batch // world)
    if mode == "none" and world > 1:
        own = _Count(config, len(share(config.particles.active, world, 0)))
        ranks = min(world, config.particles.active)
        far = math.ceil(own.mean + math.sqrt(2 * math.log(ranks) * own.variance) - 1e-9)
        most = min(max(far, most), own.limit)
    return most * config.particles.views * config.score.steps_per_round


def _batch(config: Config) -> int:
    """Particles of a step, replayed ones with them."""
    return config.score.rows_a_step(config.particles.active, config.particles.views) // config.particles.views


def _shards(config: Config, world: int) -> Iterator[tuple[int, int]]:
    """(ranks, particles that each of them owns), for each size of share."""
    small, longer = divmod(config.particles.active, world)
    if longer:
        yield longer, small + 1
    yield world - longer, small


class _Count:
    """How many particles of a step's batch a rank has that owns `own`: dealt ones, drawn without replacement, and
    replayed ones, drawn with replacement."""

    def __init__(self, config: Config, own: int) -> None:
        self._count, self._own = config.particles.active, own
        self._fresh = config.score.fresh(self._count, config.particles.views)
        self._old = config.score.replayed(self._fresh)
        self._part = part = own / self._count
        self._means = self._fresh * part, self._old * part
        left = self._count - self._fresh
        self._variances = (
            self._fresh * part * (1 - part) * left / max(self._count - 1, 1),  # hypergeometric
            self._old * part * (1 - part),  # binomial
        )
        self.mean, self.variance = sum(self._means), sum(self._variances)
        self.limit = min(own, self._fresh) + (self._old if own else 0)

    def above(self, most: int) -> float:
        """The expectation of what is above `most`."""
        if self.variance > SMOOTH:
            deviation = math.sqrt(self.variance)
            z = (self.mean - most) / deviation
            density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
            return deviation * (density + z * (1 + math.erf(z / math.sqrt(2))) / 2)
        return sum(p * q * max(0, i + j - most) for i, p in self._dealt() for j, q in self._drawn())

    def _dealt(self) -> Iterator[tuple[int, float]]:
        """Numbers of dealt particles, with their chances."""
        others = self._count - self._own
        least, most = max(0, self._fresh - others), min(self._own, self._fresh)
        for number in _near(least, most, self._means[0], self._variances[0]):
            ways = _log_choose(self._own, number) + _log_choose(others, self._fresh - number)
            yield number, math.exp(ways - _log_choose(self._count, self._fresh))

    def _drawn(self) -> Iterator[tuple[int, float]]:
        """Numbers of replayed particles, with their chances."""
        if self._part in (0.0, 1.0):
            yield int(self._part) * self._old, 1.0
            return
        for number in _near(0, self._old, self._means[1], self._variances[1]):
            chance = number * math.log(self._part) + (self._old - number) * math.log1p(-self._part)
            yield number, math.exp(_log_choose(self._old, number) + chance)


def _near(least: int, most: int, mean: float, variance: float) -> range:
    """The numbers from least to most that are not too far from the mean to matter."""
    reach = SPREAD * (1 + math.sqrt(variance))
    return range(max(least, math.floor(mean - reach)), min(most, math.ceil(mean + reach)) + 1)


def _log_choose(of: int, number: int) -> float:
    return math.lgamma(of + 1) - math.lgamma(number + 1) - math.lgamma(of - number + 1)
