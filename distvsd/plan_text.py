"""A plan as text for a terminal; ASCII only, schedules drawn as lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

LEVELS = "_.-=*#"
MAX_OWNER_LINES = 16


def draw(plan: Mapping[str, Any]) -> str:
    """All of `make_plan`'s result that a person wants to see."""
    return "\n".join(_lines(plan))


def _lines(plan: Mapping[str, Any]) -> Iterator[str]:
    world, particle, score, checkpoint = plan["world"], plan["particle"], plan["score"], plan["checkpoint"]
    per_node = world["gpus_per_node"]
    yield f"ranks        {world['ranks']} (nodes {world['nodes']}, ranks a node {per_node}), rounds {plan['rounds']}"
    yield from _owners(plan["owners"], plan["idle_ranks"])
    if plan["prior"]["problem"]:
        yield f"prior        {plan['prior']['problem']}; what depends on it is unknown here"
    else:
        yield f"prior        {plan['prior']['path']}, {amount(plan['prior']['weight_bytes'])} of weights on disk"
    yield (
        f"particle     {count(particle['parameters'])} parameters: values {amount(particle['values'])}, "
        f"gradient {amount(particle['gradient'])}, Adam {amount(particle['moments'])}"
    )
    yield (
        f"score        {count(score['parameters'])} parameters: gradient {amount(score['gradient'])}, "
        f"reduced a round and rank {amount(score['reduced_a_round'])}"
    )
    memory = plan["rank_memory"]
    yield (
        f"memory       largest rank {amount(memory['total'])} + activations: particles {amount(memory['particles'])}, "
        f"score {amount(memory['score'])}, prior {amount(memory['prior_files'])}"
    )
    unet = plan["unet"]
    yield (
        f"UNet a round busiest rank, in samples: prior {unet['prior']}, score {unet['score']}, "
        f"score training (with backward) {unet['score_training']}"
    )
    yield from _phases(plan["phases"])
    yield (
        f"checkpoint   {amount(checkpoint['total'])}, {checkpoint['kept']} kept: "
        f"particles {amount(checkpoint['particles'])}, score {amount(checkpoint['score'])}, "
        f"replay up to {amount(checkpoint['replay'])}"
    )
    yield f"schedules    rounds 0 to {plan['rounds'] - 1}"
    for key, schedule in plan["schedules"].items():
        yield "  " + _chart(key, schedule)


def _owners(owners: Sequence[Mapping[str, Any]], idle: int) -> Iterator[str]:
    for row in owners[:MAX_OWNER_LINES]:
        ids = row["particles"]
        names = "none" if not ids else f"{ids[0]}" if len(ids) == 1 else f"{ids[0]}-{ids[-1]}"
        yield f"  rank {row['rank']:<6} particles {names} ({len(ids)})"
    if len(owners) > MAX_OWNER_LINES:
        last = len(owners[-1]["particles"])
        yield f"  ... and {len(owners) - MAX_OWNER_LINES} more ranks, the last with {last} particles"
    if idle:
        yield f"  {idle} ranks own no particle and only help to train the score network"


def _phases(phases: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "exchange     a round and rank"
    for phase in phases:
        shape = "?" if phase["latent_shape"] is None else " x ".join(map(str, phase["latent_shape"]))
        yield (
            f"  from round {phase['round']:<8} {phase['resolution']} pixels, latents {shape}: "
            f"sends {amount(phase['sent_a_round'])}, receives {amount(phase['received_a_round'])}"
        )


def _chart(key: str, schedule: Mapping[str, Any]) -> str:
    values = schedule["chart"]
    low, high = min(values), max(values)
    if low == high:
        return f"{key:<32} {low:g}"
    marks = "".join(LEVELS[round((value - low) / (high - low) * (len(LEVELS) - 1))] for value in values)
    points = ", ".join(f"{start}: {value:g}" for start, value in schedule["points"])
    return f"{key:<32} {low:g} |{marks}| {high:g}   {schedule['kind']} {points}"


def amount(size: int | None) -> str:
    """Bytes in binary units, three digits; "unknown" for None."""
    if size is None:
        return "unknown"
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"


def count(number: int | None) -> str:
    """A whole number with its thousands apart; "unknown" for None."""
    return "unknown" if number is None else f"{number:,}"
