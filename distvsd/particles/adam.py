"""Adam whose state belongs to each particle, batched over particles.

With one Adam over all particles, momentum would move a particle that is left out of an update. Here moments and step
counts are rows, and only the rows of a mask move.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class ParticleAdam:
    """Moments of P particles: `mean` and `square` have the shapes of the trained parameters `[P, ...]`; `count` `[P]`
    counts each particle's steps.

    Adam of arXiv 1412.6980 without weight decay (decay on hash grids erases what is not in view).
    """

    betas: tuple[float, float]
    eps: float
    mean: dict[str, Tensor]
    square: dict[str, Tensor]
    count: Tensor

    @staticmethod
    def zeros(parameters: dict[str, Tensor], betas: tuple[float, float], eps: float) -> ParticleAdam:
        first = next(iter(parameters.values()))
        return ParticleAdam(
            betas,
            eps,
            {name: torch.zeros_like(value) for name, value in parameters.items()},
            {name: torch.zeros_like(value) for name, value in parameters.items()},
            torch.zeros(first.shape[0], dtype=torch.int64, device=first.device),
        )

    @torch.no_grad()
    def step(
        self,
        parameters: dict[str, Tensor],
        gradients: dict[str, Tensor],
        learning_rates: dict[str, float],
        moves: Tensor,
        factors: Tensor | None = None,
    ) -> None:
        """Updates in place the particles where `moves` `[P]` is true; the others keep every bit, moments included.

        factors: `[P]` float32 on the learning rates; a factor of 1 changes no bit.
        """
        beta1, beta2 = self.betas
        everyone = bool(moves.all())
        self.count += moves
        count = self.count.clamp_min(1).double()
        # Bias corrections in double: 1 - beta2^n loses half its digits in single precision for small n.
        correction1 = (1 - beta1**count).float()
        correction2 = (1 - beta2**count).float().sqrt()
        for name, value in parameters.items():
            gradient, mean, square = gradients[name], self.mean[name], self.square[name]
            rows = (-1, *[1] * (value.ndim - 1))
            if not everyone:
                # A gradient that is not finite must not reach the arithmetic: 0 * NaN is NaN.
                gradient = torch.where(moves.reshape(rows), gradient, torch.zeros_like(gradient))
            new_mean = mean * beta1 + gradient * (1 - beta1)
            new_square = square * beta2 + gradient.square() * (1 - beta2)
            rate = learning_rates[name] / correction1
            if factors is not None:
                rate = rate * factors
            change = rate.reshape(rows) * new_mean / (new_square.sqrt() / correction2.reshape(rows) + self.eps)
            if everyone:
                mean.copy_(new_mean), square.copy_(new_square), value.sub_(change)
            else:
                kept = moves.reshape(rows)
                mean.copy_(torch.where(kept, new_mean, mean))
                square.copy_(torch.where(kept, new_square, square))
                value.copy_(torch.where(kept, value - change, value))
