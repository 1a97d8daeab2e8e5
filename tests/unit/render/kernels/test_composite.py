"""Packed compositing: a walk along each ray in float64 as reference, finite differences, and rays without samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distvsd.render.kernels.composite import BLOCK, composite
from distvsd.render.volume import composite as composite_dense

COUNTS = (3, 0, 1, BLOCK, 0, BLOCK + 5, 2)  # samples of each ray: none, one, a whole block, more than one block


def packed(
    counts: tuple[int, ...] = COUNTS, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ray, lengths, density, colour."""
    generator = torch.Generator().manual_seed(0)
    ray = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.int64))
    lengths, density = (torch.rand(2, len(ray), generator=generator, dtype=dtype) * torch.tensor([[0.2], [4.0]])).to(
        dtype
    )
    return ray, lengths, density, torch.rand(len(ray), 3, generator=generator, dtype=dtype)


def walked(ray: Tensor, lengths: Tensor, density: Tensor, color: Tensor, rays: int) -> tuple[Tensor, Tensor, Tensor]:
    """One ray after the other, with the dense reference on its samples alone."""
    light, opacity, weights = [], [], []
    for number in range(rays):
        of = ray == number
        ends = lengths[of].cumsum(0)
        out = composite_dense(ends - lengths[of], ends, density[of], color[of])
        light.append(out.color)
        opacity.append(out.opacity)
        weights.append(out.weights)
    return torch.stack(light), torch.stack(opacity), torch.cat(weights)


def with_gradients(made: object, ray: Tensor, lengths: Tensor, density: Tensor, color: Tensor) -> list[Tensor]:
    leaves = (density.clone().requires_grad_(), color.clone().requires_grad_())
    outs = made(ray, lengths, *leaves, len(COUNTS))  # type: ignore[operator]
    # A weight of its own for each number, so that no error cancels.
    total = sum((out * (torch.arange(out.numel()).reshape(out.shape).to(out.dtype) * 0.7).sin()).sum() for out in outs)
    return [*(out.detach() for out in outs), *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_those_of_a_walk_along_each_ray(dtype: torch.dtype) -> None:
    given = packed(dtype=dtype)
    found = with_gradients(composite, *given)
    wanted = with_gradients(walked, *(value.double() if value.is_floating_point() else value for value in given))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-8)


def test_gradients_agree_with_finite_differences() -> None:
    ray, lengths, density, color = packed((1, 0, 3), torch.float64)
    inputs = (density.requires_grad_(), color.requires_grad_())
    assert torch.autograd.gradcheck(lambda d, c: composite(ray, lengths, d, c, 3), inputs, atol=1e-6)


def test_a_thin_sample_keeps_its_digits() -> None:
    """1 - exp(-1e-6) in float32 has two digits if it is taken as a difference."""
    out = composite(torch.tensor([0]), torch.tensor([1e-3]), torch.tensor([1e-3]), torch.ones(1, 3), 1)
    assert abs(out[1].item() / 9.999995e-07 - 1) < 1e-6


def test_a_wall_hides_what_is_behind_and_stops_its_gradient() -> None:
    ray, lengths = torch.zeros(3, dtype=torch.int64), torch.ones(3)
    density = torch.tensor([0.0, 1e4, 5.0], requires_grad=True)
    light, opacity, weights = composite(ray, lengths, density, torch.eye(3), 1)
    assert weights.tolist() == [0, 1, 0] and light.tolist() == [[0, 1, 0]] and opacity.item() == 1
    (gradient,) = torch.autograd.grad(light[0, 2], density)
    assert gradient.tolist() == [0, 0, 0]


@pytest.mark.parametrize("rays", [0, 3])
def test_without_samples_every_ray_is_clear(rays: int) -> None:
    density, color = torch.zeros(0, requires_grad=True), torch.zeros(0, 3, requires_grad=True)
    light, opacity, weights = composite(torch.zeros(0, dtype=torch.int64), torch.zeros(0), density, color, rays)
    assert light.shape == (rays, 3) and opacity.shape == (rays, 1) and weights.shape == (0,)
    assert not light.any() and not opacity.any()
    gradients = torch.autograd.grad(light.sum() + opacity.sum() + weights.sum(), (density, color))
    assert [gradient.numel() for gradient in gradients] == [0, 0]


def test_the_bits_of_a_ray_do_not_depend_on_the_others() -> None:
    given = packed()
    together = composite(*given, len(COUNTS))[0][5]
    of = given[0] == 5
    alone = composite(torch.zeros(int(of.sum()), dtype=torch.int64), *(value[of] for value in given[1:]), 1)[0][0]
    assert torch.equal(together, alone)
