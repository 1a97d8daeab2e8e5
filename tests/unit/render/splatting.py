"""An independent splatting for comparison: a loop over gaussians, dense in pixels, with gsplat's arguments."""

from __future__ import annotations

import torch


def rasterization(
    *, means, quats, scales, opacities, colors, viewmats, Ks, width, height, near_plane, eps2d, packed, rasterize_mode
):
    """As `gsplat.rasterization` of version 1.5.3 by its documentation, for particles `[P, N]` and cameras `[P, V]`.

    viewmats: world to camera, x right, y down, z forward. Ks: intrinsics in pixels.
    """
    assert (packed, rasterize_mode) == (False, "classic"), "the only mode that is asked for"
    images, alphas = [], []
    for p in range(means.shape[0]):
        for v in range(viewmats.shape[1]):
            image, alpha = _one(
                means[p], quats[p], scales[p], opacities[p], colors[p], viewmats[p, v], Ks[p, v], width, height,
                near_plane, eps2d,
            )  # fmt: skip
            images.append(image), alphas.append(alpha)
    shape = (*viewmats.shape[:2], height, width)
    return torch.stack(images).reshape(*shape, 3), torch.stack(alphas).reshape(*shape, 1), {}


def _one(means, quats, scales, opacities, colors, view, camera, width, height, near, blur):
    column, row = torch.meshgrid(torch.arange(width) + 0.5, torch.arange(height) + 0.5, indexing="xy")
    seen = means @ view[:3, :3].T + view[:3, 3]
    image = means.new_zeros(height, width, 3)
    light = means.new_ones(height, width)
    for n in seen[:, 2].argsort(stable=True).tolist():
        x, y, z = seen[n]
        if z <= near:
            continue
        fx, fy = camera[0, 0], camera[1, 1]
        u, v = fx * x / z + camera[0, 2], fy * y / z + camera[1, 2]
        limit_x, limit_y = 1.3 * width / (2 * fx), 1.3 * height / (2 * fy)
        tx, ty = z * (x / z).clamp(-limit_x, limit_x), z * (y / z).clamp(-limit_y, limit_y)
        zero = torch.zeros_like(z)
        jacobian = torch.stack(
            (torch.stack((fx / z, zero, -fx * tx / z**2)), torch.stack((zero, fy / z, -fy * ty / z**2)))
        )
        turned = _turn(quats[n]) @ torch.diag(scales[n])
        half = jacobian @ view[:3, :3] @ turned
        covariance = half @ half.T + blur * torch.eye(2, dtype=z.dtype)
        d = torch.stack((column.to(z) - u, row.to(z) - v), dim=-1)
        power = torch.einsum("hwi,ij,hwj->hw", d, torch.linalg.inv(covariance), d) / 2
        alpha = (opacities[n] * torch.exp(-power)).clamp_max(0.999)
        alpha = torch.where(alpha < 1 / 255, torch.zeros_like(alpha), alpha)
        image = image + (light * alpha)[..., None] * colors[n]
        light = light * (1 - alpha)
    return image, 1 - light[..., None]


def _turn(quaternion):
    """By turning the three axes, q v q*, instead of the formula of the matrix."""
    q = quaternion / quaternion.norm()

    def times(a, b):
        scalar = a[0] * b[0] - a[1:] @ b[1:]
        return torch.cat((scalar[None], a[0] * b[1:] + b[0] * a[1:] + torch.linalg.cross(a[1:], b[1:])))

    conjugate = q * q.new_tensor([1, -1, -1, -1])
    axes = torch.eye(3, dtype=q.dtype)
    return torch.stack([times(times(q, torch.cat((axes.new_zeros(1), axis))), conjugate)[1:] for axis in axes], dim=1)
