"""Gaussian splatting (Kerbl et al., "3D Gaussian Splatting for Real-Time Radiance Field Rendering", arXiv 2308.04079),
batched over particles and views.

`torch` is the plain reference, for every device and for float32 and float64. `gsplat` is the library of that name, on
CUDA only; both follow its conventions. gsplat leaves out what is behind a transmittance of 1e-4, and the reference does
not. The path through gsplat is written from the documentation of its version 1.5.3 and was not run on a GPU.

Shape legend: P particles, V views, N gaussians a particle, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from distvsd.cameras import Cameras
from distvsd.errors import BackendError
from distvsd.render.blend import CUT, Ellipses, blend

SplatBackend = Literal["torch", "gsplat"]
NEAR = 0.01  # world units along the camera's axis; nearer gaussians are not drawn
BLUR = 0.3  # square pixels on both axes of a projected covariance, so that none falls between two pixel centres
_MARGIN = 0.3  # of half a view: how far outside of it the perspective is linearised where a gaussian is


def splat_backend(
    asked: Literal["auto", "torch", "gsplat"], numerics: Literal["fast", "exact"], device: torch.device
) -> SplatBackend:
    """The backend that was asked for; auto is gsplat on CUDA where it can be imported and sums need no fixed order.

    Raises BackendError for gsplat in exact numerics, and on another device than CUDA.
    """
    on_cuda, fixed_order = device.type == "cuda", numerics == "exact"
    if asked == "gsplat" and not on_cuda:
        raise BackendError(f"render.splat_backend gsplat runs on CUDA only, not on {device}; set it to torch")
    if asked == "gsplat" and fixed_order:
        raise BackendError(
            "parallel.numerics is exact, but render.splat_backend gsplat adds in no fixed order; "
            "set render.splat_backend=torch"
        )
    if asked != "auto":
        return asked
    return "gsplat" if on_cuda and not fixed_order and find_spec("gsplat") else "torch"


@dataclass(frozen=True)
class Splats:
    """N gaussians of each of P particles, before their activations; one floating dtype, one device.

    means `[P, N, 3]`: world units. log_scales `[P, N, 3]`: exp of it is the standard deviation along the gaussian's
    own axes, world units. quaternions `[P, N, 4]`: (w, x, y, z), of any length above 0, turns its own axes into the
    world's. opacity_logits `[P, N]`: sigmoid of it is alpha at the centre, before the blur. color_logits
    `[P, N, 3]`: sigmoid of it is RGB, the same from every side.
    """

    means: Tensor
    log_scales: Tensor
    quaternions: Tensor
    opacity_logits: Tensor
    color_logits: Tensor

    @property
    def scales(self) -> Tensor:
        return self.log_scales.exp()

    @property
    def opacities(self) -> Tensor:
        return self.opacity_logits.sigmoid()

    @property
    def colors(self) -> Tensor:
        return self.color_logits.sigmoid()

    def finite(self) -> tuple[Splats, Tensor]:
        """The same with zeros in the place of every particle that has a number which is not finite, and which
        particles have none, `[P]` bool."""
        fields = (self.means, self.log_scales, self.quaternions, self.opacity_logits, self.color_logits)
        sound = torch.stack([value.isfinite().flatten(1).all(1) for value in fields]).all(0)
        kept = [
            torch.where(sound.reshape(-1, *[1] * (value.ndim - 1)), value, torch.zeros_like(value)) for value in fields
        ]
        return Splats(*kept), sound


@dataclass(frozen=True)
class Splatted:
    """color `[P, V, H, W, 3]` (times opacity), opacity `[P, V, H, W, 1]`."""

    color: Tensor
    opacity: Tensor


def splat(splats: Splats, cameras: Cameras, height: int, width: int, backend: SplatBackend = "torch") -> Splatted:
    """Draws P particles from cameras `[P, V]`, whose extrinsics are rigid; differentiable in all of `splats`.

    A gaussian is drawn where its alpha is at least 1/255, around its mean projected with the perspective linearised
    there; pixel centres are those of `cameras.rays`. With `torch` on the CPU the same call has the same bits, and on
    CUDA under torch's deterministic algorithms. A particle with a number that is not finite is NaN in all its pixels,
    has zeros for its gradient, and changes no other particle. Raises BackendError where gsplat cannot be imported.
    """
    sane, sound = splats.finite()
    draw = _gsplat if backend == "gsplat" else _torch
    drawn = draw(sane, cameras, height, width)
    drawn = torch.where(sound.reshape(-1, 1, 1, 1, 1), drawn, torch.full_like(drawn, torch.nan))
    return Splatted(drawn[..., :3], drawn[..., 3:])


def rotations(quaternions: Tensor) -> Tensor:
    """Rotation matrices `[..., 3, 3]` of quaternions `[..., 4]` (w, x, y, z) of any length; those of zero turn
    nothing."""
    w, x, y, z = (quaternions / quaternions.norm(dim=-1, keepdim=True).clamp_min(1e-12)).unbind(-1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def _towards(cameras: Cameras) -> Tensor:
    """World-to-camera rotations `[P, V, 3, 3]` whose rows are right, down and forward: the axes that gsplat has."""
    flip = cameras.extrinsics.new_tensor([[1.0], [-1.0], [-1.0]])
    return cameras.extrinsics[..., :3, :3].transpose(-1, -2) * flip


def _focal(cameras: Cameras, height: int) -> Tensor:
    """Pixels at distance 1, `[P, V]`: pixels are square and `fovy` spans the height."""
    return height / (2 * torch.tan(cameras.fovy / 2))


def _torch(splats: Splats, cameras: Cameras, height: int, width: int) -> Tensor:
    particles, views = cameras.shape
    ellipses = _project(splats, cameras, height, width)
    drawn = blend(ellipses, height, width)
    return drawn.reshape(particles, views, 4, height, width).permute(0, 1, 3, 4, 2)


def _project(splats: Splats, cameras: Cameras, height: int, width: int) -> Ellipses:
    """The gaussians as every camera sees them; images are P V."""
    particles, views = cameras.shape
    count = splats.means.shape[1]
    turn = _towards(cameras)
    from_camera = splats.means[:, None] - cameras.extrinsics[..., None, :3, 3]  # [P, V, N, 3]
    right, down, forward = torch.einsum("pvij,pvnj->pvin", turn, from_camera).unbind(2)
    in_front = forward > NEAR
    forward = torch.where(in_front, forward, torch.ones_like(forward))
    focal = _focal(cameras, height)[..., None]
    # The perspective is linearised at the mean, or at the margin of the view where the mean is beyond it: further out
    # the linear map grows without bound.
    most_x, most_y = ((1 + _MARGIN) * edge / (2 * focal) for edge in (width, height))
    slope_x = torch.minimum(torch.maximum(right / forward, -most_x), most_x)
    slope_y = torch.minimum(torch.maximum(down / forward, -most_y), most_y)
    per_unit = focal / forward
    axes = rotations(splats.quaternions) * splats.scales[:, :, None]  # [P, N, 3, own axis]
    seen = torch.einsum("pvij,pnjk->pvink", turn, axes)  # [P, V, 3, N, own axis]
    across = (seen[:, :, 0] - slope_x[..., None] * seen[:, :, 2]) * per_unit[..., None]
    along = (seen[:, :, 1] - slope_y[..., None] * seen[:, :, 2]) * per_unit[..., None]
    var_x, var_y = across.square().sum(-1) + BLUR, along.square().sum(-1) + BLUR
    covariance = (across * along).sum(-1)
    determinant = var_x * var_y - covariance.square()
    opacity = splats.opacities[:, None].expand_as(forward)
    visible = in_front & (determinant > 0) & (opacity >= CUT) & determinant.isfinite()
    determinant = torch.where(visible, determinant, torch.ones_like(determinant))
    shape = (particles * views, count)
    red, green, blue = splats.colors[:, None].expand(-1, views, -1, -1).unbind(-1)
    return Ellipses(
        *(
            value.reshape(shape)
            for value in (
                right * per_unit + width / 2,
                down * per_unit + height / 2,
                var_y / determinant,
                -covariance / determinant,
                var_x / determinant,
                opacity,
                red,
                green,
                blue,
                forward,
                visible,
            )
        )
    )


def _gsplat(splats: Splats, cameras: Cameras, height: int, width: int) -> Tensor:
    """The same by one call of gsplat 1.5.3, whose leading dimension is that of the particles."""
    try:
        from gsplat import rasterization
    except ImportError as error:
        raise BackendError(
            f"render.splat_backend is gsplat, which cannot be imported here ({error}); install it with "
            "`pip install distvsd[cuda]`, or set render.splat_backend=torch"
        ) from error
    turn, focal = _towards(cameras), _focal(cameras, height)
    view = torch.zeros_like(cameras.extrinsics)
    view[..., :3, :3] = turn
    view[..., :3, 3] = -torch.einsum("pvij,pvj->pvi", turn, cameras.extrinsics[..., :3, 3])
    view[..., 3, 3] = 1
    camera = torch.zeros_like(view[..., :3, :3])
    camera[..., 0, 0] = camera[..., 1, 1] = focal
    camera[..., 0, 2], camera[..., 1, 2], camera[..., 2, 2] = width / 2, height / 2, 1
    color, opacity, _ = rasterization(
        means=splats.means.contiguous(),
        quats=splats.quaternions.contiguous(),
        scales=splats.scales,
        opacities=splats.opacities,
        colors=splats.colors,
        viewmats=view,
        Ks=camera,
        width=width,
        height=height,
        near_plane=NEAR,
        eps2d=BLUR,
        packed=False,
        rasterize_mode="classic",
    )
    return torch.cat((color, opacity), dim=-1)
