"""A plan as text for a terminal; ASCII only, schedules drawn as lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distvsd.config.scalars import printable

LEVELS = "_.-=*#"
MAX_LINES = 16  # of the ranks, of the phases; more are counted
MAX_POINTS = 8  # of a schedule
MAX_PROBLEM = 1000  # characters of what is wrong with the prior

# The fields of `Assumptions` in words, with the value in its place; the option that changes one is named like it.
ASSUMED = {
    "round_s": "a round takes {:g} s (the sum of phase_s in metrics.jsonl of a short run tells)",
    "disk_mb_s": "the shared disk takes, or gives, {:g} MB/s, all ranks together",
    "restart_s": "{:g} s from the end of a job to the loading of its checkpoint: queue, imports, weights",
    "node_mtbf_days": "a node fails once in {:g} days on average",
}


def draw(plan: Mapping[str, Any]) -> str:
    """The plan as lines of text; for a run with stages one plan after the other."""
    if "stages" not in plan:
        return "\n".join(_lines(plan))
    stages = plan["stages"]
    titles = [f"stage {number} of {len(stages)}: {stage['name']}" for number, stage in enumerate(stages, 1)]
    return "\n\n".join(f"{title}\n{draw(stage)}" for title, stage in zip(titles, stages, strict=True))


def _lines(plan: Mapping[str, Any]) -> Iterator[str]:
    world, particle, score, checkpoint = plan["world"], plan["particle"], plan["score"], plan["checkpoint"]
    per_node = world["gpus_per_node"]
    yield f"ranks        {world['ranks']} (nodes {world['nodes']}, ranks a node {per_node}), rounds {plan['rounds']}"
    yield from _owners(plan["owners"], plan["idle_ranks"], per_node)
    if plan["paging"]:
        yield from _paging(plan["paging"])
    if plan["prior"]["problem"]:
        yield f"prior        {printable(plan['prior']['problem'], MAX_PROBLEM)}; what depends on it is unknown here"
    elif plan["prior"]["note"]:
        yield f"prior        {plan['prior']['note']}"
    else:
        path = printable(plan["prior"]["path"], MAX_PROBLEM)
        yield f"prior        {path}, {amount(plan['prior']['weight_bytes'])} of weights on disk"
    yield (
        f"particle     {count(particle['parameters'])} parameters: values {amount(particle['values'])}, "
        f"gradient {amount(particle['gradient'])}, Adam {amount(particle['moments'])}"
    )
    yield f"score        {count(score['parameters'])} parameters: a flat sum carries {amount(score['gradient'])}"
    yield from _strategies(plan["strategies"])
    memory = plan["rank_memory"]
    yield (
        f"memory       largest rank {amount(memory['total'])} + activations: particles {amount(memory['particles'])}, "
        f"score {amount(memory['score'])}, prior as its files {amount(memory['prior'])}"
    )
    unet = plan["unet"]
    yield (
        f"UNet a round busiest rank, in samples: prior {unet['prior']}, score {unet['score']}, "
        f"score training (with backward) {unet['score_training']}"
    )
    yield from _floor(plan.get("floor"))
    yield from _exchanges(plan["exchanges"])
    yield from _phases(plan["phases"])
    yield (
        f"wire         a round at most, renders and gradients: each rank {amount(plan['wire']['rank'])} out and in, "
        f"all ranks {amount(plan['wire']['all'])}"
    )
    yield (
        f"checkpoint   {amount(checkpoint['total'])}, {checkpoint['kept']} kept: "
        f"particles {amount(checkpoint['particles'])}, score {amount(checkpoint['score'])}, "
        f"replay up to {amount(checkpoint['replay'])}"
    )
    yield from _saves(checkpoint)
    yield from _failures(plan["failures"])
    yield "assumed"
    for name, value in plan["assumed"].items():
        yield f"  {'--' + name.replace('_', '-'):<18} {ASSUMED[name].format(value)}"
    yield f"schedules    rounds 0 to {plan['rounds'] - 1}"
    for key, schedule in plan["schedules"].items():
        yield "  " + _chart(key, schedule)


def _owners(owners: Sequence[Mapping[str, Any]], idle: int, per_node: int) -> Iterator[str]:
    """A line per rank, or a line per node where those are too many: a node's particles are consecutive."""
    world = owners[-1]["ranks"][1] + 1
    a_line = 1 if world <= MAX_LINES else per_node
    for first in range(0, world, a_line)[:MAX_LINES]:
        last = first + a_line - 1
        start, stop = _start(owners, first), _start(owners, last + 1)
        which = "none" if start == stop else f"{start}" if stop == start + 1 else f"{start}-{stop - 1}"
        name = f"rank {first:<6}" if a_line == 1 else f"node {first // per_node:<6} ranks {f'{first}-{last}':<12}"
        yield f"  {name} particles {which} ({stop - start})"
    lines = world // a_line
    if lines > MAX_LINES:
        held = _start(owners, world) - _start(owners, world - a_line)
        yield f"  ... and {lines - MAX_LINES} more nodes, the last with {held} particles"
    if idle:
        yield f"  {idle} ranks own no particle and only help to train the score network"


def _paging(paging: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"turns        a particle takes part in one of {paging['turns']} rounds, {paging['updates']:.4g} updates "
        f"in all; at most {paging['active']} particles a round"
    )
    yield "  largest rank " + ", ".join(
        f"{place}: {'?' if paging[place] is None else paging[place]} particles {amount(paging[f'{place}_bytes'])}"
        for place in ("device", "host", "disk")
    )


def _start(owners: Sequence[Mapping[str, Any]], rank: int) -> int:
    """The first particle that no rank below this one owns."""
    row = next((row for row in owners if rank <= row["ranks"][1]), owners[-1])
    return int(row["first"] + (rank - row["ranks"][0]) * row["each"])


def _saves(checkpoint: Mapping[str, Any]) -> Iterator[str]:
    """How long a save takes, and whether the rounds wait for it."""
    when = f"every {checkpoint['every']} rounds" if checkpoint["every"] else "at the end only"
    yield (
        f"  {when}: written and read back in {duration(checkpoint['write_s'])}, of which the rounds wait "
        f"{duration(checkpoint['stall_s'])}; a resume reads {amount(checkpoint['loaded'])} in "
        f"{duration(checkpoint['load_s'])}"
    )


def _failures(failures: Mapping[str, Any]) -> Iterator[str]:
    yield f"failures     {failures['a_day']:.3g} a day expected"
    if failures["share"] is None:
        yield "  what each loses is unknown, as the size of a checkpoint is"
        return
    yield (
        f"  each loses {failures['rounds_average']:.4g} rounds, {failures['minutes_average']:.3g} minutes on average; "
        f"at most {failures['rounds_most']:g} rounds, {failures['minutes_most']:.3g} minutes"
    )
    whole = failures["hours_with_failures"]
    end = "with them it never ends" if whole is None else f"{whole:.3g} h with them"
    yield f"  the run takes {failures['hours']:.3g} h without failures, {end}: {failures['share']:.2%} of it lost"


def _strategies(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What a rank holds and sends under each; the configuration's is marked."""
    if rows:
        yield "strategies   a rank: frozen UNet, what is trained and its optimiser, sent a round"
    for row in rows:
        yield _choice(row["strategy"], row, ("base", "trained", "sent_a_round"))


def _exchanges(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What each exchange trains on the busiest rank, and what all ranks send; the run's is marked."""
    if rows:
        yield "exchanges    busiest rank trains on, all ranks send a round; more in a logged round; more in a save"
    for row in rows:
        yield _choice(row["mode"], row, ("round", "log", "save"), f"{row['trained']:>9} samples  ")


def _choice(name: str, row: Mapping[str, Any], sizes: Sequence[str], before: str = "") -> str:
    """One of several ways, with its bytes; the chosen one is marked."""
    mark = "*" if row["chosen"] else " "
    return f"  {name:<12}{mark}{before}" + "  ".join(f"{amount(row[key]):>9}" for key in sizes)


def _phases(phases: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "exchange     a round and rank, on average over ranks"
    for phase in phases[:MAX_LINES]:
        shape = "?" if phase["latent_shape"] is None else " x ".join(map(str, phase["latent_shape"]))
        yield (
            f"  from round {phase['round']:<8} renders of {phase['resolution']} pixels; the UNet sees latents {shape}"
            f"{_of_image(phase['encoded_at'])}: "
            f"sends {amount(phase['sent_a_round'])}, receives {amount(phase['received_a_round'])}"
        )
    if len(phases) > MAX_LINES:
        yield f"  ... and {len(phases) - MAX_LINES} more, the last from round {phases[-1]['round']}"


def _floor(found: Mapping[str, Any] | None) -> Iterator[str]:
    """The least time of a round: the last resolution part by part, the others as one line each."""
    if found is None:
        return
    ceilings, rows = found["ceilings"], found["rounds"]
    yield (
        f"floor        busiest rank at {ceilings['gflops']:.3g} GFLOP/s and {ceilings['gbps']:.3g} GB/s "
        f"({ceilings['what']}; --gflops, --gbps)"
    )
    for row in rows[:MAX_LINES]:
        least, measured = duration(row["seconds"]), _measured(row["measured"])
        yield f"  {row['resolution']} pixels: a round takes at least {least}{measured}"
    if len(rows) > MAX_LINES:
        yield f"  ... and {len(rows) - MAX_LINES} more resolutions"
    last = rows[-1]
    yield f"  {'at ' + str(last['resolution']) + ' pixels':<16}{'GFLOP':>10}{'MB':>10}{'seconds':>10}"
    for part, work in last["work"].items():
        if work is None:
            yield f"  {part:<16}{'unknown':>10}"
        elif part == "render" and not any(work.values()):
            yield f"  {part:<16}not counted for this kind of particle"
        else:
            seconds = last["parts"][part]
            yield f"  {part:<16}{work['flops'] / 1e9:>10.3g}{work['bytes'] / 1e6:>10.3g}{seconds:>10.3g}"


def _measured(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    ratios = ", ".join(f"{phase} {ratio:.3g}" for phase, ratio in found["ratios"].items() if ratio is not None)
    whole = "" if found["ratio"] is None else f", {found['ratio']:.3g} times that ({ratios})"
    return f"; run.dir measured {duration(found['seconds'])}{whole}"


def _of_image(edge: int | None) -> str:
    return "" if edge is None else f" of {edge} pixels"


def _chart(key: str, schedule: Mapping[str, Any]) -> str:
    values = schedule["chart"]
    low, high = min(values), max(values)
    if low == high:
        return f"{key:<32} {low:g}"
    marks = "".join(LEVELS[round((value - low) / (high - low) * (len(LEVELS) - 1))] for value in values)
    points = ", ".join(f"{start}: {value:g}" for start, value in schedule["points"][:MAX_POINTS])
    if len(schedule["points"]) > MAX_POINTS:
        points += f", ... {len(schedule['points'])} points"
    return f"{key:<32} {low:g} |{marks}| {high:g}   {schedule['kind']} {points}"


def amount(size: int | None) -> str:
    """Bytes in binary units, three digits; "unknown" for None."""
    if size is None:
        return "unknown"
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" or 100 <= value < 1e6 else f"{value:.3g} {unit}"


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours, three digits; "unknown" for None."""
    if seconds is None:
        return "unknown"
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def count(number: int | None) -> str:
    """A whole number with its thousands apart; "unknown" for None."""
    return "unknown" if number is None else f"{number:,}"
