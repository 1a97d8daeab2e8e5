"""What many ranks cost: each strategy of the score network, saves, and failures under assumptions that the plan prints.

A failure loses all rounds after the newest published checkpoint (docs/checkpoint-format.md). A save in the background
publishes its checkpoint some rounds after the state that it holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distvsd.config import Config
from distvsd.plan.needs import FLOAT_BYTES

DAY_S, HOUR_S, MINUTE_S = 86_400, 3_600, 60


@dataclass(frozen=True)
class Assumptions:
    """What no configuration says. disk_mb_s: bandwidth of the shared disk, to write or to read, for all ranks together,
    in 10^6 bytes a second. round_s: seconds a round. restart_s: seconds from the end of a job to its first round,
    without loading the checkpoint: queue, imports, weights. node_mtbf_days: mean time between failures of one node.
    """

    disk_mb_s: float = 1000.0
    round_s: float = 5.0
    restart_s: float = 300.0
    node_mtbf_days: float = 100.0


def strategies(
    config: Config, base: int | None, trained: int | None, reduced: int | None, passes: int, world: int
) -> list[dict[str, Any]]:
    """A row for each `parallel.strategy`, in bytes per rank: the frozen UNet; the trained values with their gradients
    and optimiser state; what is sent in a round. No rows where something is unknown.

    base: bytes of the whole UNet. trained: how many values are trained. reduced: bytes that the flat sum reduces.
    passes: calls of the UNet in a round without a backward pass. The blocks of a spread UNet that are gathered during a
    call come on top.
    """
    if base is None or trained is None or reduced is None:
        return []
    values = trained * FLOAT_BYTES
    part, base_part = -(-values // world), -(-base // world)
    chosen: str = config.parallel.strategy
    if chosen == "deepspeed":
        chosen = f"{chosen}-{config.parallel.zero_stage}"
    steps = config.score.steps_per_round
    # In a ring each rank sends, and receives, others / world of the bytes: twice for a sum, once for a gather.
    others = world - 1
    flat_sum, values_sum = steps * 2 * others * reduced // world, steps * 2 * others * values // world
    zero_sum = steps * 3 * others * values // world  # the sum, and the new values from the ranks that stepped
    # A spread network is gathered for each call, and again in its backward pass.
    gathered = (passes + 2 * steps) * others * base // world
    # Values, gradient, two moments; ddp and DeepSpeed have buckets beside them, DeepSpeed's optimiser its own values.
    rows = (
        ("flat", base, 4 * values, flat_sum),
        ("ddp", base, 5 * values, values_sum),
        ("fsdp2", base_part, 4 * values, flat_sum + gathered),
        ("deepspeed-1", base, 3 * values + 3 * part, zero_sum),
        ("deepspeed-2", base, 2 * values + 4 * part, zero_sum),
        ("deepspeed-3", base_part, values + 5 * part, zero_sum + gathered),
    )
    names = ("strategy", "base", "trained", "sent_a_round")
    return [dict(zip(names, row, strict=True)) | {"chosen": row[0] == chosen} for row in rows]


def disk_times(config: Config, saved: int | None, loaded: int | None, assumed: Assumptions) -> dict[str, float | None]:
    """Seconds. `write_s`: to write a save and read it back. `load_s`: to resume. `stall_s`: the rounds wait for a save.

    saved: bytes of a checkpoint. loaded: bytes that all ranks read to resume. None where they are unknown.
    """
    rate = assumed.disk_mb_s * 1e6
    write_s = None if saved is None else 2 * saved / rate
    stall_s = write_s
    if write_s is not None and config.checkpoint.asynchronous:
        # A save that is due waits for the one under way.
        stall_s = max(0.0, write_s - _interval(config) * assumed.round_s)
    return {"write_s": write_s, "load_s": None if loaded is None else loaded / rate, "stall_s": stall_s}


def failures(config: Config, nodes: int, times: Mapping[str, float | None], assumed: Assumptions) -> dict[str, Any]:
    """What a failure loses on average and at most, how many are expected, and the run's hours without and with them.

    times: of `disk_times`; where one is unknown, what depends on it is None. A failure comes at any moment with the
    same probability. `hours_with_failures` is also None where failures take so much time that the run never ends.
    """
    a_day = nodes / assumed.node_mtbf_days
    write_s, load_s, stall_s = times["write_s"], times["load_s"], times["stall_s"]
    if write_s is None or load_s is None or stall_s is None:
        unknown = ("rounds_average", "rounds_most", "minutes_average", "minutes_most", "share", "hours")
        return {"a_day": a_day} | dict.fromkeys((*unknown, "hours_with_failures"))
    interval = _interval(config)
    cycle_s = interval * assumed.round_s + stall_s
    # A state that is saved in the background can be lost until the round in which it is published.
    late = min(interval, math.ceil(write_s / assumed.round_s)) if config.checkpoint.asynchronous else 0
    late_s = late * cycle_s / interval
    # A dead peer is noticed at the latest when a collective times out.
    again_s = config.parallel.timeout_s + assumed.restart_s + load_s
    average_s = late_s + cycle_s / 2 + again_s
    share = a_day * average_s / DAY_S
    saves = math.ceil(config.schedule.rounds / interval)
    hours = (config.schedule.rounds * assumed.round_s + saves * stall_s) / HOUR_S
    return {
        "a_day": a_day,
        "rounds_average": late + interval / 2 * (1 + stall_s / cycle_s),
        "rounds_most": late + interval,
        "minutes_average": average_s / MINUTE_S,
        "minutes_most": (late_s + cycle_s + again_s) / MINUTE_S,
        "share": share,
        "hours": hours,
        "hours_with_failures": hours / (1 - share) if share < 1 else None,
    }


def _interval(config: Config) -> int:
    """Rounds between saves; the whole run where only its end is saved."""
    return min(config.checkpoint.every or config.schedule.rounds, config.schedule.rounds)
