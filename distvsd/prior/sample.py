"""Ancestral sampling from the prior: the reference that particles are compared with."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distvsd.errors import PriorError
from distvsd.networks.base import Condition
from distvsd.networks.components import quiet
from distvsd.networks.settings import foreign
from distvsd.vsd.rng import Purpose, generator, normal

if TYPE_CHECKING:
    from distvsd.prior.pipeline import Pipeline


@torch.no_grad()
def ancestral(
    prior: Pipeline,
    ids: Tensor,
    views: Tensor | None,
    guidance_scale: float,
    steps: int,
    seed: int,
    resolution: int,
    batch_size: int,
) -> Tensor:
    """One image for each of `ids` `[count]`: `[count, 3, H, W]` float32 in [0, 1]; `views` `[count]`, or None.

    All random numbers of image i are keyed by (seed, i): the initial noise, and the noise that the scheduler draws.
    """
    most = prior.scheduler.config.num_train_timesteps
    if not 1 <= steps <= most:
        raise PriorError(f"{steps} sampling steps; give between 1 and the prior's {most} timesteps")
    shape = prior.latent_shape(resolution)
    images = [torch.zeros((0, 3, resolution, resolution), device=prior.device)]
    for first in range(0, len(ids), batch_size):
        indices = torch.arange(first, min(first + batch_size, len(ids)))
        of = ids[indices]
        text = prior.condition(of, None if views is None else views.cpu()[indices])
        noise = normal(seed, Purpose.SAMPLE, indices, 0, shape).to(prior.device)
        draws = [generator(seed, Purpose.SAMPLE, int(index)) for index in indices]
        latents = _denoise(prior, noise, text, guidance_scale, steps, draws)
        _check_finite(prior, latents)
        images.append(prior.decode(latents).clamp(0, 1))
    return torch.cat(images)


def _denoise(
    prior: Pipeline, noise: Tensor, text: Condition, guidance_scale: float, steps: int, draws: list[torch.Generator]
) -> Tensor:
    def library() -> AbstractContextManager[None]:
        """Wraps calls of the scheduler, not of the network: a wrong configuration may show only here."""
        what = f"the {type(prior.scheduler).__name__} of {prior.folder.path} cannot draw in {steps} steps"
        return foreign(what, "try another number of steps, and check scheduler_config.json")

    with library(), quiet():
        scheduler: Any = type(prior.scheduler).from_config(prior.scheduler.config)
        scheduler.set_timesteps(steps, device=prior.device)
        # Schedulers that add no noise of their own take no generator.
        extra = {"generator": draws} if "generator" in inspect.signature(scheduler.step).parameters else {}
        latents: Tensor = noise * scheduler.init_noise_sigma
        timesteps = list(scheduler.timesteps)
    for timestep in timesteps:
        with library():
            scaled = scheduler.scale_model_input(latents, timestep)
        output = prior.guided_output(scaled, timestep.expand(len(latents)), text, guidance_scale)
        with library():
            latents = scheduler.step(output, timestep, latents, **extra).prev_sample
    return latents


def _check_finite(prior: Pipeline, latents: Tensor) -> None:
    if not bool(torch.isfinite(latents).all()):
        raise PriorError(
            f"samples of the prior {prior.folder.path} are not finite (drawn in {prior.dtype} with "
            f"{type(prior.scheduler).__name__}); try prior.dtype=float32, and check that a schedule ending in pure "
            "noise comes with v_prediction"
        )
