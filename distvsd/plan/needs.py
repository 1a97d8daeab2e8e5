"""What a run must hold at least, worked out from its configuration before anything of it is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distvsd.config import Config
from distvsd.errors import ConfigError

FLOAT_BYTES = 4
# The background of a radiance field: 24 numbers of the direction, 16 hidden, 3 colours, each layer with its bias.
BACKGROUND_PARAMETERS = (24 * 16 + 16) + (16 * 3 + 3)


def particle_parameters(config: Config, prior: Mapping[str, Any]) -> int | None:
    """Trained numbers of one particle; None for latent images of a prior that is not here."""
    if config.particles.kind == "image":
        size = config.render.resolution_at(config.schedule.rounds - 1)
        if config.particles.image.space == "pixel":
            return 3 * size**2
        return None if prior["downscale"] is None else int(prior["latent_channels"] * (size // prior["downscale"]) ** 2)
    nerf = config.particles.nerf
    table = 1 << nerf.log2_table_size
    entries: int = sum(min(resolution**3, table) for resolution in grid_resolutions(config))
    decoder = 4 * nerf.levels * nerf.features + 4
    background = BACKGROUND_PARAMETERS if nerf.background == "learned" else 0
    return entries * nerf.features + decoder + background


def grid_resolutions(config: Config) -> list[int]:
    """Vertices along an edge of each level: floor(base b^l), from the base to the maximum (Eq. 2, arXiv 2201.05989)."""
    nerf = config.particles.nerf
    if nerf.levels == 1:
        return [nerf.base_resolution]
    growth = (nerf.max_resolution / nerf.base_resolution) ** (1 / (nerf.levels - 1))
    # The small addition keeps a power that should be whole from falling below it by rounding.
    return [int(nerf.base_resolution * growth**level + 1e-6) for level in range(nerf.levels)]


def refuse_too_large(config: Config, prior: Mapping[str, Any], particles: int, room: int, where: str) -> None:
    """Raises ConfigError if a rank with so many particles surely takes more than the `room` bytes of its `where`."""
    needs = least_memory(config, prior, particles)
    if sum(needs.values()) > room:
        listed = ", ".join(f"{what} {_gib(size)}" for what, size in needs.items())
        raise ConfigError(
            f"a rank would need at least {_gib(sum(needs.values()))} ({listed}), and its {where} has {_gib(room)}; "
            "take more ranks, or lower particles.count, particles.views, render.resolution or the size of a particle "
            "(`distvsd plan` shows what each takes)"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"


def least_memory(config: Config, prior: Mapping[str, Any], particles: int) -> dict[str, int]:
    """Bytes that a rank with so many particles has on its device at once, by what they are for; activations, the prior
    and the score network come on top.

    prior: `latent_channels`, `downscale`, `resolution`. A particle is its values, gradient and two moments. Of the
    renders, those of one call are there as pictures, and all of a round as latents: of all ranks where a score network
    trains on them.
    """
    views, kind = config.particles.views, config.particles
    size = min(config.render.corners(config.schedule.rounds))
    micro_batch = 1 if config.parallel.numerics == "exact" else kind.micro_batch or particles
    pixels = 0 if kind.kind == "image" and kind.image.space == "latent" else 3 * size**2
    latents = prior["latent_channels"] * (config.encoded_edge(size, prior["resolution"]) // prior["downscale"]) ** 2
    renders = (particles if not config.objective.needs_score else kind.count) * views
    return {
        "particles": 4 * FLOAT_BYTES * (particle_parameters(config, prior) or 0) * particles,
        "pictures of a call": FLOAT_BYTES * min(micro_batch, particles) * views * pixels,
        "latents of a round": FLOAT_BYTES * renders * latents,
    }
