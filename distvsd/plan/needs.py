"""The least memory that a run needs, computed before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distvsd.config import Config
from distvsd.errors import ConfigError
from distvsd.particles.base import Particle

FLOAT_BYTES = 4
TRAINED_COPIES = 4  # of a trained number: its value, its gradient, Adam's two moments
SAVED_COPIES = 3  # of those all but the gradient


def particle_bytes(particle: Particle, config: Config) -> int:
    """Bytes of one particle in training."""
    cost = particle.cost(config.final_resolution)
    return FLOAT_BYTES * (TRAINED_COPIES * cost.trained + cost.frozen)


@dataclass(frozen=True)
class Places:
    """Where the particles of some ranks are. device: slots. host, disk: particles at home there, beside those in slots.
    page: bytes of one of them, with its good state where the run is long enough for one."""

    device: int
    host: int
    disk: int
    page: int


def places_of(config: Config, particle: Particle, particles: int) -> Places:
    """Of a rank, or several, with so many particles. Bytes are exact but for headers of a few hundred bytes."""
    own = config.particles
    if own.turns == 1:
        return Places(particles, 0, 0, page_bytes(particle, config))
    in_memory = own.in_memory * particles // own.count
    return Places(-(-particles // own.turns), in_memory, particles - in_memory, page_bytes(particle, config))


def page_bytes(particle: Particle, config: Config) -> int:
    """Bytes of one particle that is not on the device."""
    cost = particle.cost(config.final_resolution)
    copies = 2 if config.schedule.rounds > config.particles.health.good_every else 1
    return FLOAT_BYTES * (copies * SAVED_COPIES * cost.trained + cost.frozen)


def refuse_unpaged(places: Places, room: int, free: int, disk: Path) -> None:
    """Raises ConfigError where the particles of the ranks of one machine do not fit into its memory and on its disk.

    places: of those ranks together. room: bytes of host memory that are left. free: bytes on the disk of `disk`.
    """
    if places.host * places.page > room:
        raise ConfigError(
            f"the {places.host} particles of a machine that are to be kept in host memory need "
            f"{_gib(places.host * places.page)}, and there are {_gib(room)}, enough for {room // places.page}; lower "
            "particles.host (0 is all), so that the others are in files, or take more machines"
        )
    if places.disk * places.page > free:
        raise ConfigError(
            f"the {places.disk} particles of a machine that are to be kept in files need "
            f"{_gib(places.disk * places.page)}, and the disk of {disk} has {_gib(free)} free, enough for "
            f"{free // places.page}; make room, set particles.page_dir to a larger disk, raise particles.host, or take "
            "more machines"
        )


def refuse_too_large(config: Config, particle: Particle, latents: int, particles: int, room: int, where: str) -> None:
    """Raises ConfigError if a rank with this many particles certainly needs more than `room` bytes.

    where: what has the room, for the message. The other arguments are those of `least_memory`.
    """
    needs = least_memory(config, particle, latents, particles)
    if sum(needs.values()) > room:
        listed = ", ".join(f"{what} {_gib(size)}" for what, size in needs.items())
        raise ConfigError(
            f"a rank would need at least {_gib(sum(needs.values()))} ({listed}), and its {where} has {_gib(room)}; "
            f"take more ranks, or lower particles.count, particles.views, render.resolution or the size of a particle "
            f"(`distvsd plan` shows what each takes){_paged_instead(config, particle, needs, particles, room)}"
        )


def _paged_instead(config: Config, particle: Particle, needs: dict[str, int], particles: int, room: int) -> str:
    """What particles.resident would have to be, as the end of the message; empty where it would not help."""
    others = sum(size for what, size in needs.items() if what != "particles")
    fitting = (room - others) // particle_bytes(particle, config)
    if fitting < 1 or fitting >= particles:
        return ""
    most = fitting * config.particles.count // particles
    return f"; {fitting} of its {particles} particles would fit at a time, which particles.resident={most} asks for"


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"


def least_memory(config: Config, particle: Particle, latents: int, particles: int) -> dict[str, int]:
    """Bytes that a rank with this many particles has on its device at once, by purpose; activations, the prior and the
    score network come on top. Where particles take turns, those of one turn.

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
    active = -(-particles // config.particles.turns)
    renders = (config.particles.active if gets_all else active) * views
    return {
        "particles": particle_bytes(particle, config) * active,
        "pictures of a call": FLOAT_BYTES * min(group or active, active) * views * pixels,
        "latents of a round": FLOAT_BYTES * renders * latents,
    }
