"""Emission-absorption volume rendering along rays: where to sample, and how samples become a pixel.

`composite` is plain torch; with `backend="nerfacc"` the weights come from nerfacc's dense functions, which run on the
CPU and on CUDA. Both are differentiable and agree to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from distvsd.errors import BackendError

VolumeBackend = Literal["torch", "nerfacc"]


def volume_backend(
    asked: Literal["auto", "torch", "nerfacc"], numerics: Literal["fast", "exact"], device: torch.device
) -> VolumeBackend:
    """The backend that was asked for; auto is nerfacc on CUDA where it can be imported and sums need no fixed order.

    Raises BackendError for nerfacc in exact numerics on CUDA.
    """
    fixed_order = numerics == "exact"
    if asked == "nerfacc" and fixed_order and device.type == "cuda":
        raise BackendError(
            "parallel.numerics is exact, but render.backend nerfacc adds in no fixed order on CUDA; "
            "set render.backend=torch"
        )
    if asked != "auto":
        return asked
    return "nerfacc" if device.type == "cuda" and not fixed_order and find_spec("nerfacc") else "torch"


@dataclass(frozen=True)
class Composited:
    """color `[..., 3]` (premultiplied by opacity), opacity `[..., 1]`, weights and middles (world units) of the
    samples, each `[..., S]`."""

    color: Tensor
    opacity: Tensor
    weights: Tensor
    middles: Tensor

    @property
    def depth(self) -> Tensor:
        """Expected depth, not divided by the opacity: `[..., 1]`, world units."""
        return (self.weights * self.middles).sum(-1, keepdim=True)


def sample_intervals(
    origins: Tensor, directions: Tensor, bound: float, num_samples: int, jitter: Tensor
) -> tuple[Tensor, Tensor]:
    """Interval ends along rays clipped to the cube [-bound, bound]^3: `(starts, ends)`, each `[..., S]`, world units.

    origins, directions: `[..., 3]`. jitter: `[...]` in [0, 1), shifts the interval ends of a ray within a step (0.5 is
    the centre). A ray that misses the cube, or leaves it behind the camera, gets intervals of length zero.
    """
    safe = torch.where(directions.abs() < 1e-9, torch.full_like(directions, 1e-9), directions)
    low, high = (-bound - origins) / safe, (bound - origins) / safe
    near = torch.minimum(low, high).amax(-1).clamp_min(0)
    far = torch.maximum(torch.maximum(low, high).amin(-1), near)
    step = (far - near) / num_samples
    index = torch.arange(num_samples + 1, dtype=origins.dtype, device=origins.device)
    ends = near[..., None] + step[..., None] * (index + (jitter[..., None] - 0.5))
    ends = torch.minimum(torch.maximum(ends, near[..., None]), far[..., None])
    return ends[..., :-1], ends[..., 1:]


def composite(
    starts: Tensor, ends: Tensor, density: Tensor, color: Tensor, backend: VolumeBackend = "torch"
) -> Composited:
    """Max's quadrature: weights T_i (1 - exp(-density_i delta_i)) with T_i the transmittance before sample i.

    starts, ends, density: `[..., S]`; color: `[..., S, 3]`. Differentiable in density and color.
    """
    if backend == "nerfacc":
        weights = _nerfacc_weights(starts, ends, density)
    else:
        optical = density * (ends - starts)
        before = torch.cumsum(optical, dim=-1) - optical
        weights = torch.exp(-before) * -torch.expm1(-optical)
    return Composited(
        torch.einsum("...s,...sc->...c", weights, color), weights.sum(-1, keepdim=True), weights, (starts + ends) / 2
    )


def _nerfacc() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Its function from intervals and densities to weights, transmittances and alphas."""
    try:
        from nerfacc.volrend import render_weight_from_density
    except ImportError as error:
        raise BackendError(
            f"render.backend is nerfacc, which cannot be imported here ({error}); install it with "
            "`pip install distvsd[cuda]`, or set render.backend=torch"
        ) from error
    found: Callable[..., tuple[Tensor, Tensor, Tensor]] = render_weight_from_density
    return found


def _nerfacc_weights(starts: Tensor, ends: Tensor, density: Tensor) -> Tensor:
    # nerfacc takes [rays, samples]; only its dense path runs without CUDA.
    flat = density.reshape(-1, density.shape[-1])
    weights, _, _ = _nerfacc()(starts.reshape_as(flat), ends.reshape_as(flat), flat)
    shaped: Tensor = weights.reshape(density.shape)
    return shaped


def nerfacc_packed_weights(ray: Tensor, starts: Tensor, ends: Tensor, density: Tensor, num_rays: int) -> Tensor:
    """Weights `[K]` of samples packed one ray after the other, by nerfacc, on CUDA only. Not run on a GPU yet.

    ray: `[K]` int64, ascending; starts, ends, density: `[K]` float32. Differentiable in density.
    """
    weights: Tensor = _nerfacc()(starts, ends, density, ray_indices=ray, n_rays=num_rays)[0]
    return weights
