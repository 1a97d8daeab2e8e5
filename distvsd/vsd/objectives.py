"""The gradients that move a particle: variational, plain and entropic score distillation.

Shape legend: B samples (views of particles), C latent channels, H x W latent pixels. Every objective is
w(t) (eps_prior - eps_other) with another `eps_other`; none differentiates through a network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distvsd.faults import poison
from distvsd.vsd.process import add_noise
from distvsd.vsd.rng import Purpose, normal, uniform
from distvsd.vsd.samples import Samples

ObjectiveKind = Literal["vsd", "sds", "esd"]


def weight(abar_B: Tensor) -> Tensor:
    """w(t) = sigma_t^2 = 1 - alphas_cumprod[t], as in the paper's code (Eq. 9, arXiv 2305.16213)."""
    return 1 - abar_B


def distillation_gradient(eps_prior_BCHW: Tensor, eps_other_BCHW: Tensor, abar_B: Tensor, num_views: int) -> Tensor:
    """d loss / d x_0: w(t) (eps_prior - eps_other), summed over latent elements and divided by the views of a particle.

    Eq. 9 with eps_other = eps_score (VSD); Eq. 3 with eps_other = the added noise (SDS).
    """
    return weight(abar_B).reshape(-1, 1, 1, 1) * (eps_prior_BCHW - eps_other_BCHW) / num_views


def entropic_eps(eps_camera_BCHW: Tensor, eps_no_camera_BCHW: Tensor, esd_lambda: float) -> Tensor:
    """What ESD puts in place of eps_score: (1 - lambda) with the camera, lambda without (arXiv 2401.00909)."""
    return (1 - esd_lambda) * eps_camera_BCHW + esd_lambda * eps_no_camera_BCHW


def draw_timesteps(uniform_B: Tensor, t_min: float, t_max: float, num_timesteps: int) -> Tensor:
    """Timesteps int64 in [t_min T, t_max T], from uniform numbers in [0, 1); t_min, t_max are fractions of T."""
    low, high = round(t_min * (num_timesteps - 1)), round(t_max * (num_timesteps - 1))
    return (low + uniform_B * (high - low + 1)).long().clamp(max=high)


@dataclass(frozen=True)
class Objective:
    """Draws t and noise for each sample and asks the two networks; called on each rank with its own samples only.

    prior_eps(noisy, timesteps, ids, views) and score_eps(noisy, timesteps, ids, cameras or None) return float32 noise
    predictions without a graph. t_min, t_max: fractions of T as functions of the round.
    """

    kind: ObjectiveKind
    seed: int
    num_views: int
    alphas_cumprod: Tensor
    prior_eps: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    score_eps: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    t_min: Callable[[int], float]
    t_max: Callable[[int], float]
    esd_lambda: float = 0.5

    @torch.no_grad()
    def __call__(self, samples: Samples, step: int) -> Tensor:
        """The gradient at the latents, float32 `[N, C, h, w]`; zero where a sample is masked. Does not communicate.

        What the networks answer for one sample stays in its row: where it is not finite, so is the gradient, and the
        particle does not move (`Ensemble.update`).

        The samples of a particle must be adjacent, `num_views` each: t and noise are keyed by (particle, view, step).
        """
        if len(samples) == 0:
            return torch.zeros_like(samples.latents)
        particles = samples.ids[:: self.num_views]
        u = uniform(self.seed, Purpose.TIMESTEP, particles, step, (self.num_views,)).flatten()
        timesteps = draw_timesteps(u, self.t_min(step), self.t_max(step), len(self.alphas_cumprod))
        noise = normal(self.seed, Purpose.NOISE, particles, step, (self.num_views, *samples.latents.shape[1:])).flatten(
            0, 1
        )
        abar = self.alphas_cumprod[timesteps]
        valid = (samples.weight > 0).reshape(-1, 1, 1, 1)
        # A masked sample enters the networks as zeros: multiplying its result by zero would keep its NaN.
        latents = torch.where(valid, samples.latents, torch.zeros_like(samples.latents))
        noisy = add_noise(latents, noise, abar)
        eps_prior = poison("score", self.prior_eps(noisy, timesteps, samples.ids, samples.views), samples.ids)
        eps_other = self._eps_other(noisy, timesteps, samples, noise)
        gradient = distillation_gradient(eps_prior, eps_other, abar, self.num_views)
        return torch.where(valid, gradient, torch.zeros_like(gradient))

    def _eps_other(self, noisy: Tensor, timesteps: Tensor, samples: Samples, noise: Tensor) -> Tensor:
        match self.kind:
            case "sds":
                return noise
            case "vsd":
                return self.score_eps(noisy, timesteps, samples.ids, samples.cameras)
            case "esd" if self.esd_lambda in (0, 1):  # one of both answers would be multiplied by zero
                cameras = samples.cameras if self.esd_lambda == 0 else None
                return self.score_eps(noisy, timesteps, samples.ids, cameras)
            case "esd":
                with_camera = self.score_eps(noisy, timesteps, samples.ids, samples.cameras)
                return entropic_eps(with_camera, self.score_eps(noisy, timesteps, samples.ids, None), self.esd_lambda)
        raise ValueError(f"objective kind is {self.kind!r}; known are 'vsd', 'sds' and 'esd'")
