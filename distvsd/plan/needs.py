"""The least memory that a run needs, computed before anything is allocated."""

from __future__ import annotations

from distvsd.config import Config
from distvsd.errors import ConfigError
from distvsd.particles.base import Particle

FLOAT_BYTES = 4
TRAINED_COPIES = 4  # of a trained number: its value, its gradient, Adam's two moments


def particle_bytes(particle: Particle, config: Config) -> int:
    """Bytes of one particle in training."""
    cost = particle.cost(config.final_resolution)
    return FLOAT_BYTES * (TRAINED_COPIES * cost.trained + cost.frozen)


def refuse_too_large(config: Config, particle: Particle, latents: int, particles: int, room: int, where: str) -> None:
    """Raises ConfigError if a rank with this many particles certainly needs more than `room` bytes.

    where: what has the room, for the message. The other arguments are those of `least_memory`.
    """
    needs = least_memory(config, particle, latents, particles)
    if sum(needs.values()) > room:
        listed = ", ".join(f"{what} {_gib(size)}" for what, size in needs.items())
        raise ConfigError(
            f"a rank would need at least {_gib(sum(needs.values()))} ({listed}), and its {where} has {_gib(room)}; "
            "take more ranks, or lower particles.count, particles.views, render.resolution or the size of a particle "
            "(`distvsd plan` shows what each takes)"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"


def least_memory(config: Config, particle: Particle, latents: int, particles: int) -> dict[str, int]:
    """Bytes that a rank with this many particles has on its device at once, by purpose; activations, the prior and the
    score network come on top.

    particle: of the run's kind. latents: how many numbers one sample's latents have at the smallest resolution. The
    renders of one call are held as pictures, and all renders of a round as latents: those of all ranks where every rank
    gets all to train the score network.
    """
    views = config.particles.views
    size = min(config.render.corners(config.schedule.rounds))
    group = config.particles.micro_batch
    if group == "auto" or config.parallel.numerics == "exact":
        group = 1
    pixels = 0 if particle.is_latent else 3 * size**2
    gets_all = config.objective.needs_score and config.parallel.exchange == "all_gather"
    renders = (config.particles.count if gets_all else particles) * views
    return {
        "particles": particle_bytes(particle, config) * particles,
        "pictures of a call": FLOAT_BYTES * min(group or particles, particles) * views * pixels,
        "latents of a round": FLOAT_BYTES * renders * latents,
    }
