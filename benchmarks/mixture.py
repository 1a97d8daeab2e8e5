"""The target of the oracle benchmark: a mixture of Gaussians in the plane, its exact score, and distances from it.

Points are `[N, 2]`; `abar` `[N]` is alphas_cumprod[t], so alpha = sqrt(abar) and sigma = sqrt(1 - abar).
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distvsd.vsd.rng import Purpose, generator


def cosine_alphas_cumprod(num_timesteps: int = 1000) -> Tensor:
    """The cosine schedule of arXiv 2102.09672 (s = 0.008, beta <= 0.999), float32 `[T]`."""
    grid = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    bar = torch.cos((grid + 0.008) / 1.008 * math.pi / 2).square()
    return torch.cumprod(1 - (1 - bar[1:] / bar[:-1]).clamp(max=0.999), 0).float()


@dataclass(frozen=True)
class Mixture:
    """Isotropic Gaussians in the plane: weights `[K]` that sum to 1, means `[K, 2]`, stds `[K]`."""

    weights: Tensor
    means: Tensor
    stds: Tensor

    def log_density(self, points: Tensor, abar: Tensor) -> Tensor:
        """`[N]` log p_t, the log density of the noised mixture."""
        squared, variance = self._at(points, abar)
        parts = self.weights.log() - variance.log() - squared / (2 * variance)
        return torch.logsumexp(parts, 1) - math.log(2 * math.pi)

    def eps(self, points: Tensor, abar: Tensor) -> Tensor:
        """`[N, 2]` -sigma grad log p_t, the noise that a perfect network predicts."""
        shares, variance, alpha, sigma = self._posterior(points, abar)
        precise = shares / variance
        return sigma * (precise.sum(1, keepdim=True) * points - alpha * precise @ self.means)

    def velocity(self, points: Tensor, abar: Tensor) -> Tensor:
        """`[N, 2]` alpha eps - sigma E[x_0 | x_t]. The mean of x_0 is computed without eps, because alpha may be 0."""
        shares, variance, alpha, sigma = self._posterior(points, abar)
        kept = shares * self.stds.square() / variance
        clean = shares @ self.means + alpha * (kept.sum(1, keepdim=True) * points - alpha * kept @ self.means)
        return alpha * self.eps(points, abar) - sigma * clean

    def sample(self, count: int, seed: int) -> Tensor:
        """Independent samples `[count, 2]`."""
        stream = generator(seed, Purpose.SAMPLE)
        modes = torch.multinomial(self.weights, count, replacement=True, generator=stream)
        return self.means[modes] + self.stds[modes, None] * torch.randn(count, 2, generator=stream)

    def nearest(self, points: Tensor) -> Tensor:
        """int64 `[N]`, the mode with the nearest mean."""
        return torch.cdist(points, self.means).argmin(1)

    def _posterior(self, points: Tensor, abar: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """P(mode | x_t) and the variances `[N, K]`; alpha and sigma `[N, 1]`."""
        squared, variance = self._at(points, abar)
        shares = torch.softmax(self.weights.log() - variance.log() - squared / (2 * variance), 1)
        return shares, variance, abar.sqrt()[:, None], (1 - abar).sqrt()[:, None]

    def _at(self, points: Tensor, abar: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distances to the means times alpha, and the variances at that noise level; both `[N, K]`."""
        squared = (points[:, None] - abar.sqrt()[:, None, None] * self.means).square().sum(2)
        return squared, abar[:, None] * self.stds.square() + (1 - abar)[:, None]


def ring() -> Mixture:
    """Eight modes on a circle, weights 1/36 to 8/36 in mixed order. The heaviest mode is narrower, another is wider."""
    weights = torch.tensor([1.0, 6.0, 3.0, 8.0, 2.0, 5.0, 4.0, 7.0]) / 36
    angles = torch.arange(8) * (math.pi / 4)
    stds = torch.tensor([0.12, 0.12, 0.12, 0.06, 0.12, 0.18, 0.12, 0.12])
    return Mixture(weights, math.sqrt(2) * torch.stack((angles.cos(), angles.sin()), 1), stds)


def sliced_wasserstein(first: Tensor, second: Tensor, directions: int = 64) -> float:
    """The 1-D Wasserstein-1 distance, averaged over evenly spaced directions. Both sets are `[N, 2]`."""
    angles = (torch.arange(directions) + 0.5) * (math.pi / directions)
    axes = torch.stack((angles.cos(), angles.sin()))
    return float(((first @ axes).sort(0).values - (second @ axes).sort(0).values).abs().mean())


def measure(points: Tensor, mixture: Mixture, draws: int = 16, seed: int = 10_000) -> dict[str, Any]:
    """Distance to fresh samples of the target, mode weights by nearest mode, and the spread within each mode.

    spread: for each mode, the standard deviation of its particles about their own mean, divided by the true standard
    deviation; None for a mode with fewer than two particles.
    """
    count = len(points)
    distances = [sliced_wasserstein(points, mixture.sample(count, seed + draw)) for draw in range(draws)]
    modes = mixture.nearest(points)
    shares = torch.bincount(modes, minlength=len(mixture.weights)) / count
    spread: list[float | None] = []
    for mode, std in enumerate(mixture.stds.tolist()):
        inside = points[modes == mode]
        spread.append(float(inside.var(0).mean().sqrt()) / std if len(inside) > 1 else None)
    known = sorted(value for value in spread if value is not None)
    return {
        "sliced_wasserstein": sum(distances) / draws,
        "mode_total_variation": float((shares - mixture.weights).abs().sum()) / 2,
        "mode_weights": shares.tolist(),
        "spread": spread,
        "spread_median": statistics.median(known),
    }


def noise_floor(count: int, mixture: Mixture, repeats: int = 16, seed: int = 20_000) -> dict[str, float]:
    """The distance and total variation of `repeats` sets of true samples: means and maxima."""
    found = [measure(mixture.sample(count, seed + repeat), mixture) for repeat in range(repeats)]
    distances = [one["sliced_wasserstein"] for one in found]
    variations = [one["mode_total_variation"] for one in found]
    return {
        "sliced_wasserstein": statistics.mean(distances),
        "sliced_wasserstein_max": max(distances),
        "mode_total_variation": statistics.mean(variations),
        "mode_total_variation_max": max(variations),
    }
