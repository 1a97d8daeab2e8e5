"""Growth of gaussians by relocation, and the noise that lets nearly transparent ones explore (Kheradmand et al., "3D
Gaussian Splatting as Markov Chain Monte Carlo", arXiv 2404.09591)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_GATE_STEEPNESS = 100.0  # of the noise, as in the paper: a gaussian of 0.05 more opacity has less than a hundredth
_MOST_OPACITY = 1 - 1e-6  # its logit is finite in single precision
_REACH, _NODES = 6.0, 241  # of the quadrature; exp(-6^2) is below the rounding of float64


@dataclass(frozen=True)
class Relocated:
    """source: the gaussian whose values each one takes, `[P, N]` int64; its own number for those that stay. opacities:
    the new ones, `[P, N]`. shrunk: the factor on the standard deviations, `[P, N]`. changed: which moved or were copied
    from, `[P, N]` bool; for the others the opacity is the present one and the factor is 1."""

    source: Tensor
    opacities: Tensor
    shrunk: Tensor
    changed: Tensor


def relocated(opacities_PN: Tensor, least: float, draws_PN: Tensor) -> Relocated:
    """Moves the gaussians of opacity below `least` onto others, drawn in proportion to their opacity.

    draws: uniform numbers in [0, 1), one for each gaussian. Opacities and scales of those that share a place are
    corrected by Eq. 9, so that the picture stays nearly the same; copies keep at least `least`. A particle without a
    gaussian of that opacity stays as it is. Same bits on every device but for the rounding of the correction.
    """
    particles, count = opacities_PN.shape
    dead = opacities_PN < least
    weights = torch.where(opacities_PN >= least, opacities_PN, torch.zeros_like(opacities_PN))
    found = drawn(weights, draws_PN)
    dead = dead & (weights > 0).any(1, keepdim=True)
    itself = torch.arange(count, device=found.device).expand(particles, count)
    source = torch.where(dead, found, itself)
    # How many gaussians are where this one is: itself, unless it is moved away, and those that come.
    copies = torch.zeros_like(source).scatter_add_(1, source, torch.ones_like(source)).gather(1, source)
    changed = copies > 1
    old = opacities_PN.gather(1, source)
    new, shrunk = corrected(old, copies)
    new = new.clamp(least, _MOST_OPACITY)
    return Relocated(
        source, torch.where(changed, new, old), torch.where(changed, shrunk, torch.ones_like(old)), changed
    )


def drawn(weights_PN: Tensor, draws_PM: Tensor) -> Tensor:
    """Numbers of entries `[P, M]`, drawn in proportion to their weights in [0, 1] by uniform numbers in [0, 1).

    Weights count in steps of 2^-16: sums of integers are the same on every device. A row without weight gives its
    last entry.
    """
    steps = (weights_PN.double() * 2**16).round().long()
    sums = steps.cumsum(1)
    target = ((draws_PM.double() * 2**24).long() * sums[:, -1:]) >> 24
    return torch.searchsorted(sums, target, right=True).clamp_max(weights_PN.shape[1] - 1)


def corrected(opacities: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
    """Opacity, and factor on the standard deviations, of each of `copies` gaussians in the place of one; both as the
    arguments `[...]`.

    Eq. 9 of the paper: the new opacity is 1 - (1 - o)^(1/n), and the scale makes the light that is stopped along a line
    through the middle the same in sum. The double sum of binomials there is the integral of 1 - (1 - o e^(-t^2))^n over
    t, divided by sqrt(pi); taken numerically it has no cancelling terms and no largest n.
    """
    old, n = opacities.double(), copies.double()
    log_clear = torch.log1p(-old.clamp_max(_MOST_OPACITY)) / n
    new = -torch.expm1(log_clear)
    total = torch.zeros_like(old)
    step = 2 * _REACH / (_NODES - 1)
    for node in range(_NODES // 2 + 1):  # the integrand is even
        fall_off = math.exp(-((node * step) ** 2))
        stopped = -torch.expm1(n * torch.log1p(-new * fall_off))
        total = total + stopped * (step if node == 0 else 2 * step)
    return new.to(opacities), (old * math.sqrt(math.pi) / total).to(opacities)


def exploration(opacities_PN: Tensor, least: float, axes_PN33: Tensor, normals_PN3: Tensor) -> Tensor:
    """The noise of Eq. 8 on the means, `[P, N, 3]` world units squared, before its rate: covariance times normal
    numbers. It is half as large at opacity `least`, and soon nothing above it.

    axes: the columns are the gaussian's own axes in the world, as long as its standard deviations.
    """
    gate = torch.sigmoid(-_GATE_STEEPNESS * (opacities_PN - least))
    along = torch.einsum("pnij,pni->pnj", axes_PN33, normals_PN3)
    return gate[..., None] * torch.einsum("pnij,pnj->pni", axes_PN33, along)
