"""What a run will need, worked out from its configuration: no GPU, no weights, no network.

Counts are exact for what this program itself allocates and sends; activations and what libraries keep come on top.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from typing import Any, get_args

from distvsd.config import Config, Schedule
from distvsd.config.relations import refuse_small_latents
from distvsd.parallel.assign import share
from distvsd.particles.base import Particle
from distvsd.particles.good import most_copies
from distvsd.plan.cluster import Assumptions, disk_times, failures, strategies
from distvsd.plan.exchange import exchanges
from distvsd.plan.floor import Ceilings, Share, Work, compared, floor, works
from distvsd.plan.needs import FLOAT_BYTES, particle_bytes, places_of
from distvsd.plan.prior import PriorSizes
from distvsd.score.camera import CAMERA_FEATURES
from distvsd.score.training import kept_rows
from distvsd.vsd.objectives.base import Part, ScorePart

# A sample travels as 32-bit words: its latents, its camera, id and view (64 bits each), its weight.
SAMPLE_WORDS = CAMERA_FEATURES + 2 + 2 + 1
EXACT_BYTES = 16  # an exact sum keeps each gradient element as two 64-bit integers
CHART_COLUMNS = 48
_COUNTS = ("network", "score_network", "encoder")  # of the prior's sizes; `floor` tells what they come to


def make_plan(
    config: Config,
    particle: Particle | None,
    prior: PriorSizes,
    needs: Collection[Part],
    nodes: int = 1,
    gpus_per_node: int = 1,
    assumed: Assumptions | None = None,
    ceilings: Ceilings | None = None,
    measured: Mapping[int, Mapping[str, float]] | None = None,
) -> dict[str, Any]:
    """The plan of a stage as plain data, ready for JSON; bytes unless a name says otherwise.

    particle: of the stage's kind; None, and None for what depends on it, where only the prior knows its size and is not
    here. needs: the predictions that the objective needs. ceilings: of a rank's device; without them there is no
    `floor`, the least time of a round. measured: seconds by phase of the loop at a resolution, to compare with it.
    Raises ConfigError where training would: for latents much smaller than those that the network was trained on.
    """
    assumed = assumed or Assumptions()
    world = nodes * gpus_per_node
    largest_shard = len(share(config.particles.count, world, 0))
    busiest = -(-largest_shard // config.particles.turns)  # of a rank in one round
    if prior.resolution is not None:
        refuse_small_latents(config, prior.resolution)
    phases = [
        _phase(config, prior, round, world)
        for round, _ in config.render.resolution.points
        if round < config.schedule.rounds
    ]
    size = _particle(particle, config)
    score = _score(config, prior)
    table, chosen = _strategies(config, prior, score, needs, world)
    checkpoint = _checkpoint(config, size, score, phases, world)
    times = disk_times(config, checkpoint["total"], checkpoint["loaded"], assumed)
    samples = _unet_samples(config, needs, busiest, world)
    plan = {
        "world": {"nodes": nodes, "gpus_per_node": gpus_per_node, "ranks": world},
        "owners": _owners(config.particles.count, world),
        "idle_ranks": max(world - config.particles.count, 0),
        "paging": _paging(config, particle, largest_shard),
        "prior": {name: value for name, value in asdict(prior).items() if name not in _COUNTS},
        "particle": size,
        "rank_memory": _rank_memory(size, chosen, prior, busiest),
        "score": score,
        "strategies": table,
        "unet": samples,
        "phases": phases,
        "exchanges": exchanges(config, world, _largest_sample(phases)),
        "wire": _wire(phases, chosen, world),
        "checkpoint": checkpoint | times,
        "failures": failures(config, nodes, times, assumed),
        "assumed": asdict(assumed),
        "schedules": {key: _schedule(schedule, config.schedule.rounds) for key, schedule in _schedules(config)},
        "rounds": config.schedule.rounds,
    }
    if ceilings is None:
        return plan
    shares = _shares(phases, samples, busiest, score["parameters"])
    of_round = {share.resolution: works(config, particle, prior, share) for share in shares}
    return plan | {"floor": _floor(of_round, ceilings, measured or {})}


def _strategies(
    config: Config, prior: PriorSizes, score: Mapping[str, Any], needs: Collection[Part], world: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for each strategy, and the chosen one; its values are None where something is unknown."""
    network = prior.score_base_bytes or prior.unet_bytes
    passes = 1 + _passes(config, needs)[1]
    table = strategies(config, network, score["parameters"], score["gradient"], passes, world)
    return table, next((row for row in table if row["chosen"]), dict.fromkeys(("base", "trained", "sent_a_round")))


def _shares(
    phases: list[dict[str, Any]], samples: Mapping[str, int], particles: int, trained: int | None
) -> Iterator[Share]:
    """Of the busiest rank, one for each resolution."""
    for phase in {phase["resolution"]: phase for phase in phases}.values():
        latent, sent = phase["latent_shape"], phase["sent_a_round"]
        yield Share(
            particles=particles,
            prior=samples["prior"],
            score=samples["score"],
            training=samples["score_training"],
            trained=trained,
            resolution=phase["resolution"],
            edge=phase["encoded_at"],
            latent=None if latent is None else tuple(latent),
            moved=None if sent is None else sent + phase["received_a_round"],
        )


def _floor(
    of_round: Mapping[int, Mapping[str, Work | None]],
    ceilings: Ceilings,
    measured: Mapping[int, Mapping[str, float]],
) -> dict[str, Any]:
    """The least time of a round of the busiest rank, for each resolution; and how far the measured ones are from it."""
    rows = []
    for resolution, parts in of_round.items():
        row = {"resolution": resolution} | floor(parts, ceilings)
        found = measured.get(resolution)
        rows.append(row | {"measured": None if found is None else compared(row, found)})
    return {"ceilings": asdict(ceilings), "rounds": rows}


def _owners(particles: int, world: int) -> list[dict[str, Any]]:
    """One row per size of share, so one or two rows for any world: the first and the last of the ranks that own `each`
    particles each, and the `first` particle of the first of them. Their particles are consecutive."""
    small, longer = divmod(particles, world)
    rows = [
        {"ranks": [0, longer - 1], "first": 0, "each": small + 1},
        {"ranks": [longer, world - 1], "first": longer * (small + 1), "each": small},
    ]
    return rows if longer else rows[1:]


def _paging(config: Config, particle: Particle | None, largest_shard: int) -> dict[str, Any] | None:
    """Of particles that take turns: how many updates each gets, and where those of the largest rank are with their
    bytes, None where the particle's size is not known. None where all are on the devices."""
    own = config.particles
    if own.turns == 1:
        return None
    plan: dict[str, Any] = {
        "turns": own.turns,
        "active": own.active,
        "updates": config.schedule.rounds / own.turns,
        "device": -(-largest_shard // own.turns),
        **dict.fromkeys(("host", "disk", "device_bytes", "host_bytes", "disk_bytes")),
    }
    if particle is None:
        return plan
    places = places_of(config, particle, largest_shard)
    return plan | {
        "host": places.host,
        "disk": places.disk,
        "device_bytes": places.device * particle_bytes(particle, config),
        "host_bytes": places.host * places.page,
        "disk_bytes": places.disk * places.page,
    }


def _particle(particle: Particle | None, config: Config) -> dict[str, Any]:
    """Its numbers, which of them are trained, and their bytes; None where the particle's size is not known."""
    if particle is None:
        return dict.fromkeys(("parameters", "frozen", "values", "gradient", "moments", "training"))
    cost = particle.cost(config.final_resolution)
    return {
        "parameters": cost.trained + cost.frozen,
        "frozen": cost.frozen,
        "values": (cost.trained + cost.frozen) * FLOAT_BYTES,
        "gradient": cost.trained * FLOAT_BYTES,
        "moments": 2 * cost.trained * FLOAT_BYTES,
        "training": particle_bytes(particle, config),
    }


def _score(config: Config, prior: PriorSizes) -> dict[str, Any]:
    """The score network's trained numbers and what the flat sum reduces; SDS has no score network."""
    if not config.objective.needs_score:
        return {"parameters": 0, "gradient": 0}
    if prior.adapter_parameters is None or prior.camera_parameters is None:
        return {"parameters": None, "gradient": None}
    parameters = prior.adapter_parameters + prior.camera_parameters
    return {
        "parameters": parameters,
        "gradient": parameters * (EXACT_BYTES if config.parallel.numerics == "exact" else FLOAT_BYTES),
    }


def _passes(config: Config, needs: Collection[Part]) -> tuple[int, int]:
    """Samples that a particle's gradient takes through (the prior, the score network), for each of its views."""
    scale, guided = config.prior.guidance_scale, "guided" in needs
    prior = ("conditional" in needs or (guided and scale != 0)) + ("unconditional" in needs or (guided and scale != 1))
    return prior, sum(part in needs for part in get_args(ScorePart))


def _rank_memory(
    particle: Mapping[str, Any], chosen: Mapping[str, Any], prior: PriorSizes, largest_shard: int
) -> dict[str, Any]:
    """Every rank holds the prior whole, but for the frozen UNet where the score network shares it: `chosen` has
    that."""
    particles = None if particle["training"] is None else particle["training"] * largest_shard
    frozen = None
    if chosen["base"] is not None and prior.weight_bytes is not None and prior.unet_bytes is not None:
        shared = 0 if prior.score_base_bytes else prior.unet_bytes
        frozen = prior.weight_bytes - shared + chosen["base"]
    known = [particles, chosen["trained"], frozen]
    total = None if None in known else sum(value for value in known if value is not None)
    return {"particles": particles, "score": chosen["trained"], "prior": frozen, "total": total}


def _unet_samples(config: Config, needs: Collection[Part], busiest: int, world: int) -> dict[str, int]:
    """Samples through the UNet a round on the busiest rank: the prior, the score network, and its training.

    The score trains on all ranks' samples and on replayed ones, as `parallel.exchange` distributes them.
    """
    views = config.particles.views
    local, (prior, score) = busiest * views, _passes(config, needs)
    trained = [row["trained"] for row in exchanges(config, world, None) if row["chosen"]]
    return {"prior": local * prior, "score": local * score, "score_training": sum(trained)}


def _phase(config: Config, prior: PriorSizes, round: int, world: int) -> dict[str, Any]:
    """From this round on: the size of renders and of what the UNet sees, and the bytes of a rank, on average over
    ranks."""
    resolution = config.render.resolution_at(round)
    edge = None if prior.resolution is None else config.encoded_edge(resolution, prior.resolution)
    latent = None if edge is None else prior.latent_shape(edge)
    sample = None if latent is None else (math.prod(latent) + SAMPLE_WORDS) * FLOAT_BYTES
    sent = next((row["round"] for row in exchanges(config, world, sample) if row["chosen"]), 0)
    moved = None if sent is None else -(-sent // world)
    return {
        "round": round,
        "resolution": resolution,
        "encoded_at": edge,
        "latent_shape": latent and list(latent),
        "sample": sample,
        "sent_a_round": moved,
        "received_a_round": moved,
    }


def _largest_sample(phases: list[dict[str, Any]]) -> int | None:
    """Bytes of the largest sample of the run; None where it is not known."""
    sizes = [phase["sample"] for phase in phases]
    return None if None in sizes else max(sizes)


def _wire(phases: list[dict[str, Any]], chosen: Mapping[str, Any], world: int) -> dict[str, Any]:
    """Bytes of the largest round, renders and gradients together: what a rank sends, which equals what it receives, and
    what all ranks send. What goes round in rings loads a machine's link as much as one of its ranks."""
    sent = [phase["sent_a_round"] for phase in phases] + [chosen["sent_a_round"]]
    rank = None if None in sent else max(sent[:-1]) + sent[-1]
    return {"rank": rank, "all": None if rank is None else world * rank}


def _checkpoint(
    config: Config, particle: Mapping[str, Any], score: Mapping[str, Any], phases: list[dict[str, Any]], world: int
) -> dict[str, Any]:
    """Bytes of the largest checkpoint: values and two moments of every particle and of the score network; the replay;
    and perhaps every particle's good state, which does not repeat frozen values.

    loaded: what a resume reads. One rank hashes each file; then the owner reads a particle, and all ranks the score.
    """
    copies = most_copies(config.schedule.rounds, config.checkpoint.every, config.particles.health.good_every)
    particles = None
    if particle["values"] is not None:
        frozen = particle["frozen"] * FLOAT_BYTES
        trained = particle["values"] - frozen + particle["moments"]
        particles = (copies * trained + frozen) * config.particles.count
    network = None if score["parameters"] is None else 3 * score["parameters"] * FLOAT_BYTES
    views = config.particles.views
    rows = kept_rows(config.particles.active * views, config.score.replay_share, views)
    replay: int | None = None
    if not config.objective.needs_score:
        replay = 0
    elif phases[-1]["sample"] is not None:
        replay = config.score.replay_rounds * rows * max(phase["sample"] for phase in phases)
    parts = [particles, network, replay]
    total = None if None in parts else sum(value for value in parts if value is not None)
    loaded = None
    if particles is not None and network is not None and replay is not None:
        loaded = 2 * particles + (1 + world) * (network + replay)
    return {
        "particles": particles,
        "score": network,
        "replay": replay,
        "total": total,
        "loaded": loaded,
        "kept": config.checkpoint.keep,
        "every": config.checkpoint.every,
    }


def _schedules(config: Config) -> Iterator[tuple[str, Schedule]]:
    yield "objective.t_min", config.objective.t_min
    yield "objective.t_max", config.objective.t_max
    yield "particles.learning_rate", config.particles.learning_rate
    yield "particles.network_learning_rate", config.particles.network_learning_rate
    yield "render.resolution", config.render.resolution


def _schedule(schedule: Schedule, rounds: int) -> dict[str, Any]:
    """What the schedule does inside the run: its points, and its value at evenly spaced rounds."""
    chart = [schedule.at(column * (rounds - 1) // (CHART_COLUMNS - 1)) for column in range(CHART_COLUMNS)]
    return {"kind": schedule.kind, "points": [list(point) for point in schedule.points], "chart": chart}
