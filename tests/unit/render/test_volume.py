"""Volume rendering: values worked out by hand, an independent loop, gradients, and nerfacc's dense functions."""

import math

import pytest
import torch

from distvsd.errors import BackendError
from distvsd.render.volume import composite, sample_intervals, volume_backend


def test_weights_are_those_worked_out_by_hand():
    # Three intervals of length 1 with optical depths ln 2, ln 4 and 0:
    # alphas 1/2, 3/4, 0; transmittances 1, 1/2, 1/8; weights 1/2, 3/8, 0.
    starts, ends = torch.tensor([[0.0, 1, 2]]), torch.tensor([[1.0, 2, 3]])
    density = torch.tensor([[math.log(2), math.log(4), 0.0]])
    color = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]])
    out = composite(starts, ends, density, color)
    torch.testing.assert_close(out.weights, torch.tensor([[0.5, 0.375, 0.0]]))
    torch.testing.assert_close(out.color, torch.tensor([[0.5, 0.375, 0.0]]))
    torch.testing.assert_close(out.opacity, torch.tensor([[0.875]]))
    torch.testing.assert_close(out.depth, torch.tensor([[0.5 * 0.5 + 1.5 * 0.375]]))


def test_intervals_fill_the_part_of_the_ray_inside_the_cube():
    starts, ends = sample_intervals(
        torch.tensor([[2.0, 0, 0]]), torch.tensor([[-1.0, 0, 0]]), 0.5, 4, torch.tensor([0.5])
    )
    torch.testing.assert_close(starts, torch.tensor([[1.5, 1.75, 2.0, 2.25]]))
    torch.testing.assert_close(ends, torch.tensor([[1.75, 2.0, 2.25, 2.5]]))


@pytest.mark.parametrize("jitter", [0.0, 0.25, 0.99])
def test_jitter_moves_the_ends_and_never_leaves_the_cube(jitter):
    starts, ends = sample_intervals(
        torch.tensor([[0.0, 0, 0]]), torch.tensor([[0.0, 0, 1]]), 1.0, 8, torch.tensor([jitter])
    )
    assert starts.min() >= 0 and ends.max() <= 1 and (ends >= starts).all()
    torch.testing.assert_close(starts[:, 1:], ends[:, :-1])


@pytest.mark.parametrize("origin, direction", [((2.0, 2, 0), (-1.0, 0, 0)), ((2.0, 0, 0), (1.0, 0, 0))])
def test_a_ray_that_misses_the_cube_sees_nothing(origin, direction):
    starts, ends = sample_intervals(torch.tensor([origin]), torch.tensor([direction]), 0.5, 4, torch.tensor([0.5]))
    assert (ends - starts).abs().max() == 0
    assert composite(starts, ends, torch.ones(1, 4) * 100, torch.ones(1, 4, 3)).opacity.item() == 0


def random_rays(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    edges = torch.rand(3, 7, generator=generator, dtype=dtype).cumsum(-1)
    density = torch.rand(3, 6, generator=generator, dtype=dtype) * 3
    color = torch.rand(3, 6, 3, generator=generator, dtype=dtype)
    return edges[:, :-1], edges[:, 1:], density, color


def test_compositing_equals_a_walk_along_the_ray():
    starts, ends, density, color = random_rays()
    out = composite(starts, ends, density, color)
    for ray in range(3):
        light, through = torch.zeros(3, dtype=torch.float64), 1.0
        for i in range(6):
            alpha = 1 - math.exp(-float(density[ray, i]) * float(ends[ray, i] - starts[ray, i]))
            light += through * alpha * color[ray, i]
            through *= 1 - alpha
        torch.testing.assert_close(out.color[ray], light, rtol=0, atol=1e-12)
        assert out.opacity[ray].item() == pytest.approx(1 - through, abs=1e-12)


def test_gradients_agree_with_finite_differences():
    starts, ends, density, color = random_rays()
    inputs = (density.requires_grad_(), color.requires_grad_())
    assert torch.autograd.gradcheck(lambda d, c: composite(starts, ends, d, c).color, inputs)
    assert torch.autograd.gradcheck(lambda d, c: composite(starts, ends, d, c).opacity, inputs)


def test_nerfacc_agrees_with_the_reference_in_value_and_gradient():
    starts, ends, density, color = random_rays(torch.float32)
    gradients = []
    for backend in ("torch", "nerfacc"):
        leaf = density.clone().requires_grad_()
        out = composite(starts, ends, leaf, color, backend)
        out.color.square().sum().backward()
        gradients.append((out.color.detach(), leaf.grad))
    for reference, other in zip(*gradients, strict=True):
        torch.testing.assert_close(reference, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("asked", "numerics", "device", "chosen"),
    [
        ("torch", "fast", "cuda", "torch"),
        ("nerfacc", "fast", "cuda", "nerfacc"),
        ("nerfacc", "fast", "cpu", "nerfacc"),
        ("auto", "fast", "cpu", "torch"),
        ("auto", "exact", "cuda", "torch"),
    ],
)
def test_auto_is_the_reference_wherever_bits_must_not_change_or_no_gpu_is_there(asked, numerics, device, chosen):
    assert volume_backend(asked, numerics, torch.device(device)) == chosen


@pytest.mark.parametrize("installed", [True, False])
def test_auto_on_a_gpu_is_nerfacc_where_it_is_installed(monkeypatch, installed):
    monkeypatch.setattr("distvsd.render.volume.find_spec", lambda name: object() if installed else None)
    assert volume_backend("auto", "fast", torch.device("cuda")) == ("nerfacc" if installed else "torch")


def test_a_backend_that_adds_in_no_fixed_order_is_refused_where_the_order_matters():
    with pytest.raises(BackendError, match=r"exact.*render\.backend"):
        volume_backend("nerfacc", "exact", torch.device("cuda"))
