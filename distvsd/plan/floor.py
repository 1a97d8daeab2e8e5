"""The least time of a round: the operations and bytes of each part, counted from a configuration, at a machine's rates.

A part takes at least its operations at the rate of a large matrix product, and its bytes at the rate of a large copy.
Counted are products (2 operations a multiply-add), reads of grids, samples of rays, images, weights of networks and
states of optimisers. Not counted are element-wise arithmetic and activations. Grids that fit into a cache are read
faster than a copy, so a renderer may fall below its floor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from distvsd.config import Config
from distvsd.networks.operations import NetworkOperations
from distvsd.particles.base import Particle
from distvsd.plan.needs import FLOAT_BYTES
from distvsd.plan.prior import PriorSizes

# The parts of a round, each with the phase of the loop in which it is done; its backward pass belongs to `update`.
PHASE_OF = {
    "render": "render",
    "encode": "encode",
    "exchange": "exchange",
    "prior": "objective",
    "score": "objective",
    "update": "update",
    "score training": "score",
}
# Of a trained number in a step of Adam: its value and two moments read and written, its gradient written and read.
STEP_ACCESSES = 8


@dataclass(frozen=True)
class Ceilings:
    """What a device does at most: 10^9 operations a second in matrix products, 10^9 bytes a second read and written in
    copies. what: where the figures come from."""

    gflops: float
    gbps: float
    what: str


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes read and written."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, count: float) -> Work:
        return Work(self.flops * count, self.bytes * count)

    def seconds(self, ceilings: Ceilings) -> float:
        """The larger of the two bounds."""
        return max(self.flops / (ceilings.gflops * 1e9), self.bytes / (ceilings.gbps * 1e9))


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one rank does in a round. particles: its own. prior, score, training: samples through the prior's network,
    the score's, and the score's with a backward pass. trained: numbers of the score network. edge: pixels of the image
    that is encoded, latent: the shape of its latents. moved: bytes sent and received."""

    particles: int
    prior: int
    score: int
    training: int
    trained: int | None
    resolution: int
    edge: int | None
    latent: tuple[int, ...] | None
    moved: int | None


def works(config: Config, particle: Particle | None, sizes: PriorSizes, share: Share) -> dict[str, Work | None]:
    """The work of each part of `PHASE_OF` in a round of one rank; None where the particle or the prior is not known."""
    renders = share.particles * config.particles.views
    cost = None if particle is None else particle.cost(share.resolution)
    render = None if cost is None else Work(cost.flops, FLOAT_BYTES * cost.touched).times(renders)
    forward, backward = _encoding(config, sizes, share)
    encode = None if forward is None else forward.times(renders)
    update = None
    if render is not None and backward is not None and cost is not None:
        # The gradient of a product is two products, and a read becomes a sum into the same place.
        again = 2 + config.particles.recompute
        states = Work(bytes=STEP_ACCESSES * FLOAT_BYTES * cost.trained).times(share.particles)
        update = render.times(again) + backward.times(renders) + states
        if config.particles.recompute and forward is not None:
            update = update + forward.times(renders)
    return {
        "render": render,
        "encode": encode,
        "exchange": None if share.moved is None else Work(bytes=share.moved),
        "prior": _calls(sizes.network, 0, share.prior, share, sizes.unet_bytes),
        "score": _calls(
            sizes.score_network, config.score.rank, share.score, share, sizes.score_base_bytes or sizes.unet_bytes
        ),
        "update": update,
        "score training": _training(config, sizes, share),
    }


def _encoding(config: Config, sizes: PriorSizes, share: Share) -> tuple[Work | None, Work | None]:
    """Of one render, and of its backward pass."""
    if config.are_latents:
        return Work(), Work()
    if share.edge is None or share.latent is None or sizes.encoder is None:
        return None, None
    pictures = [share.resolution] + ([share.edge] if share.edge != share.resolution else [])
    touched = FLOAT_BYTES * (math.prod(share.latent) + sum(3 * edge**2 for edge in pictures))
    forward, backward = (pass_(share.edge**2) for pass_ in (sizes.encoder.forward, sizes.encoder.backward))
    return Work(forward, touched), Work(backward, touched)


def _calls(
    network: NetworkOperations | None, rank: int, samples: int, share: Share, weights: int | None
) -> Work | None:
    """Of `samples` through a network, whose weights are read at least once."""
    if samples == 0:
        return Work()
    if network is None or share.latent is None or weights is None:
        return None
    pixels = share.latent[1] * share.latent[2]
    return Work(network.forward(pixels, rank) * samples, weights + 2 * FLOAT_BYTES * math.prod(share.latent) * samples)


def _training(config: Config, sizes: PriorSizes, share: Share) -> Work | None:
    """Of all steps of the score network in a round."""
    weights = sizes.score_base_bytes or sizes.unet_bytes
    forward = _calls(sizes.score_network, config.score.rank, share.training, share, weights)
    if share.training == 0 or forward is None or sizes.score_network is None or share.latent is None:
        return forward
    if share.trained is None or weights is None:
        return None
    pixels, steps = share.latent[1] * share.latent[2], config.score.steps_per_round
    backward = sizes.score_network.backward(pixels, config.score.rank) * share.training
    # Each step reads the weights in both directions; the first reading is among `forward`.
    read = (2 * steps - 1) * weights + steps * STEP_ACCESSES * FLOAT_BYTES * share.trained
    return forward + Work(backward, read)


def floor(parts: Mapping[str, Work | None], ceilings: Ceilings) -> dict[str, Any]:
    """Seconds of each part, of each phase of the loop and of the round, as plain data; None where a part is unknown."""
    seconds = {name: None if work is None else work.seconds(ceilings) for name, work in parts.items()}
    phases: dict[str, float | None] = {}
    for name, phase in PHASE_OF.items():
        own, before = seconds[name], phases.get(phase, 0.0)
        phases[phase] = None if own is None or before is None else before + own
    known = [value for value in seconds.values() if value is not None]
    return {
        "work": {name: None if work is None else asdict(work) for name, work in parts.items()},
        "parts": seconds,
        "phases": phases,
        "seconds": sum(known) if len(known) == len(seconds) else None,
    }


def compared(predicted: Mapping[str, Any], measured: Mapping[str, float]) -> dict[str, Any]:
    """Measured seconds of the loop's phases beside their floor: `phases` and `seconds` as measured, and how many times
    the floor that is, None where the floor is unknown or 0."""

    def ratio(seconds: float, least: float | None) -> float | None:
        return seconds / least if least else None

    total = sum(measured.values())
    return {
        "phases": dict(measured),
        "seconds": total,
        "ratios": {phase: ratio(seconds, predicted["phases"].get(phase)) for phase, seconds in measured.items()},
        "ratio": ratio(total, predicted["seconds"]),
    }
