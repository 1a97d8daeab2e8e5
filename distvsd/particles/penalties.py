"""Regularisers of the rendered opacity, the same for every kind of particle that has one."""

from __future__ import annotations

from torch import Tensor


def sparsity(weight: float, opacity_PN: Tensor) -> Tensor:
    """The weighted mean over root mean square of the opacities of a particle's rays, `[P]` (Hoyer 2004).

    It has no gradient in the overall strength, and nearly none on solid rays: it removes fog, and neither thins the
    object nor fades all of it out.
    """
    return weight * opacity_PN.mean(1) / (opacity_PN.square().mean(1) + 1e-4).sqrt()


def coverage(weight: float, opacity_PN: Tensor, allowed: tuple[float, float]) -> Tensor:
    """By how much, weighted, the mean opacity of a particle's rays is outside the allowed range, as a logarithm `[P]`.

    It acts against the two states that `sparsity` does not see: matter that fills the view, which the prior takes for a
    background, and matter that has faded. An opacity near 1 and an activation near 0 have vanishing slopes; the
    logarithms make up for that.
    """
    covered, (low, high) = opacity_PN.mean(1), allowed
    inside = ((covered + 1e-4) / low).clamp_max(1) * ((1 - covered + 1e-4) / (1 - high)).clamp_max(1)
    return -weight * inside.log()
