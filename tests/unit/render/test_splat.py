"""Splatting: an independent loop over gaussians, finite differences, pixel centres, and isolation of particles."""

import math
import sys
import types

import pytest
import torch

from distvsd.cameras import Cameras, OrbitSampler, rays
from distvsd.config import CamerasConfig
from distvsd.errors import BackendError
from distvsd.render.blend import blend
from distvsd.render.splat import Splats, splat, splat_backend
from tests.unit.render import splatting

NAMES = ("means", "log_scales", "quaternions", "opacity_logits", "color_logits")
ORBIT = OrbitSampler(CamerasConfig(elevation=(-20.0, 40.0), distance=(1.2, 1.5), fovy=(40.0, 50.0)))


def gaussians(particles=2, count=12, seed=0, scale=-2.3, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(particles, count, *shape, generator=draw, dtype=torch.float64).to(dtype)

    return Splats(0.25 * normal(3), scale + 0.4 * normal(3), normal(4), 1.5 * normal(), normal(3))


def cameras(particles=2, views=2, seed=0, dtype=torch.float64):
    found = ORBIT.sample(seed, torch.arange(particles), 0, views, None)
    return Cameras(*(getattr(found, name).to(dtype) for name in ("extrinsics", "fovy", "elevation", "azimuth")))


def fields(splats):
    return [getattr(splats, name) for name in NAMES]


@pytest.fixture
def library(monkeypatch):
    """The independent loop in the place of gsplat."""
    module = types.ModuleType("gsplat")
    module.rasterization = splatting.rasterization
    monkeypatch.setitem(sys.modules, "gsplat", module)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (12, 20)])
def test_it_agrees_with_a_loop_over_gaussians(library, height, width):
    """The loop is reached through the arguments that gsplat gets, so these describe the same picture."""
    scene, seen = gaussians(count=30), cameras()
    ours, theirs = (splat(scene, seen, height, width, backend) for backend in ("torch", "gsplat"))
    assert ours.color.shape == (2, 2, height, width, 3) and ours.opacity.shape == (2, 2, height, width, 1)
    assert float(ours.opacity.max()) > 0.9
    torch.testing.assert_close(ours.color, theirs.color, rtol=0, atol=1e-9)
    torch.testing.assert_close(ours.opacity, theirs.opacity, rtol=0, atol=1e-9)


def test_its_gradient_agrees_with_that_of_the_loop(library):
    seen, found = cameras(), []
    weights = torch.randn(2, 2, 16, 16, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for backend in ("torch", "gsplat"):
        leaves = [value.requires_grad_() for value in fields(gaussians(count=30))]
        drawn = splat(Splats(*leaves), seen, 16, 16, backend)
        target = (torch.cat((drawn.color, drawn.opacity), dim=-1) * weights).sum()
        found.append(torch.autograd.grad(target, leaves))
    for ours, theirs in zip(*found, strict=True):
        assert float(ours.abs().max()) > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_agree_with_finite_differences(name):
    scene, seen = gaussians(particles=1, count=5), cameras(particles=1, views=1)
    others = dict(zip(NAMES, fields(scene), strict=True))

    def draw(value):
        drawn = splat(Splats(**(others | {name: value})), seen, 8, 8)
        return drawn.color, drawn.opacity

    assert torch.autograd.gradcheck(draw, others[name].clone().requires_grad_(), eps=1e-7, atol=1e-6)


TINY = math.log(1e-4)


def one(mean, opacity=10.0, log_scale=TINY, dtype=torch.float64):
    shape = mean.shape[:-1]
    return Splats(
        mean,
        torch.full((*shape, 3), log_scale, dtype=dtype),
        torch.tensor([1.0, 0, 0, 0], dtype=dtype).expand(*shape, 4),
        torch.full(shape, opacity, dtype=dtype),
        torch.zeros(*shape, 3, dtype=dtype),
    )


@pytest.mark.parametrize("pixel", [(0, 0), (3, 11), (15, 15), (8, 7)])
def test_a_tiny_gaussian_on_a_ray_lights_the_pixel_of_that_ray_most_and_is_centred_there(pixel):
    row, column = pixel
    seen = cameras(particles=1, views=1)
    origin, directions = rays(seen, 16, 16)
    mean = (origin[0, 0] + 1.1 * directions[0, 0, row, column])[None, None]
    opacity = splat(one(mean), seen, 16, 16).opacity[0, 0, ..., 0]
    # Of the blur alone: alpha at the centre is that of one gaussian, and its neighbours have exp(-1 / (2 0.3)) of it.
    assert float(opacity[row, column]) == pytest.approx(0.999, abs=1e-6)
    around = [(row + dy, column + dx) for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))]
    inside = [float(opacity[y, x]) for y, x in around if 0 <= y < 16 and 0 <= x < 16]
    assert inside == pytest.approx([math.exp(-0.5 / 0.3)] * len(inside), rel=1e-3)


def test_the_gradient_of_a_pixel_moves_a_gaussian_towards_the_ray_of_the_pixel():
    seen = cameras(particles=1, views=1)
    origin, directions = rays(seen, 16, 16)
    here, there = (origin[0, 0] + 1.1 * directions[0, 0, row, column] for row, column in ((5, 9), (6, 8)))
    mean = here[None, None].clone().requires_grad_()
    splat(one(mean, opacity=0.0), seen, 16, 16).opacity[0, 0, 6, 8, 0].backward()
    step = mean.grad[0, 0]
    across = torch.nn.functional.cosine_similarity(step, there - here, dim=0)
    assert float(across) > 0.99


def test_what_is_in_front_hides_what_is_behind():
    seen = cameras(particles=1, views=1)
    origin, directions = rays(seen, 9, 9)
    means = torch.stack([origin[0, 0] + depth * directions[0, 0, 4, 4] for depth in (1.4, 0.9)])[None]
    pair = one(means, opacity=3.0)
    pair.color_logits[0] = torch.tensor([[-50.0, 50, -50], [50, -50, -50]])
    red, green, _ = splat(pair, seen, 9, 9).color[0, 0, 4, 4]
    alpha = 1 / (1 + math.exp(-3))
    assert (float(red), float(green)) == pytest.approx((alpha, alpha * (1 - alpha)), rel=1e-9)


def test_what_is_behind_the_camera_or_beside_the_view_is_not_drawn():
    seen = cameras(particles=1, views=1)
    place, backward, right = (seen.extrinsics[0, 0, :3, axis] for axis in (3, 2, 0))
    for mean in (place + backward, place, place - backward + 5 * right):
        assert not splat(one(mean[None, None], log_scale=-3.0), seen, 16, 16).opacity.any()


def test_bands_of_bounded_memory_give_the_same_picture_and_gradient(monkeypatch):
    scene, seen, found = gaussians(count=40), cameras(), []
    for most in (10**9, 150, 1):
        monkeypatch.setattr("distvsd.render.splat.blend", lambda *args, most=most: blend(*args, most_pairs=most))
        leaves = [value.requires_grad_() for value in fields(scene)]
        drawn = splat(Splats(*leaves), seen, 16, 16)
        target = drawn.color.square().sum() + drawn.opacity.sum()
        found.append((drawn.color.detach(), *torch.autograd.grad(target, leaves)))
    for banded in found[1:]:
        for ours, whole in zip(banded, found[0], strict=True):
            torch.testing.assert_close(ours, whole, rtol=1e-10, atol=1e-12)


def test_single_precision_is_close_to_double_precision():
    drawn = [
        splat(gaussians(count=200, scale=-3.0, dtype=dtype), cameras(dtype=dtype), 32, 32).color
        for dtype in (torch.float32, torch.float64)
    ]
    assert drawn[0].dtype == torch.float32
    # Where the alpha of a pixel is 1/255 to rounding it may be drawn in one of them only.
    assert float((drawn[0] - drawn[1]).abs().max()) < 5e-3
    assert float((drawn[0] - drawn[1]).abs().mean()) < 1e-5


@pytest.mark.parametrize("backend", ["torch", "gsplat"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_particle_that_is_not_finite_is_nan_and_changes_no_other(library, backend, value):
    seen = cameras(particles=3)
    whole = splat(gaussians(particles=3), seen, 8, 8, backend).color
    for name in NAMES:
        scene = gaussians(particles=3)
        getattr(scene, name)[1].view(-1)[4] = value
        leaves = [field.requires_grad_() for field in fields(scene)]
        drawn = splat(Splats(*leaves), seen, 8, 8, backend).color
        assert bool(drawn[1].isnan().all())
        torch.testing.assert_close(drawn[[0, 2]], whole[[0, 2]], rtol=0, atol=1e-12)
        for gradient in torch.autograd.grad(drawn.sum(), leaves):
            assert bool(gradient[[0, 2]].isfinite().all()) and not gradient[1].any()


def test_a_gradient_that_is_not_finite_stays_in_its_particle():
    seen = cameras(particles=3)
    leaves = [value.requires_grad_() for value in fields(gaussians(particles=3))]
    drawn = splat(Splats(*leaves), seen, 8, 8)
    upstream = torch.ones_like(drawn.color)
    sound = torch.autograd.grad(drawn.color, leaves, upstream, retain_graph=True)
    upstream[1] = math.nan
    for gradient, expected in zip(torch.autograd.grad(drawn.color, leaves, upstream), sound, strict=True):
        assert bool(gradient[1].isnan().any())
        assert torch.equal(gradient[[0, 2]], expected[[0, 2]])


def test_nothing_to_draw_is_an_empty_picture():
    far = gaussians(particles=1, count=3)
    far.means[:] += 100
    assert not splat(far, cameras(particles=1), 8, 8).opacity.any()
    none = Splats(*(value[:0] for value in fields(gaussians())))
    assert splat(none, cameras()[:0], 8, 8).color.shape == (0, 2, 8, 8, 3)


@pytest.mark.parametrize(
    ("asked", "numerics", "device", "expected"),
    [
        ("auto", "fast", "cpu", "torch"),
        ("auto", "exact", "cuda", "torch"),
        ("torch", "fast", "cuda", "torch"),
        ("gsplat", "fast", "cuda", "gsplat"),
    ],
)
def test_backends_are_chosen_by_device_and_numerics(asked, numerics, device, expected):
    assert splat_backend(asked, numerics, torch.device(device)) == expected


@pytest.mark.parametrize("installed", [True, False])
def test_auto_on_a_gpu_is_gsplat_where_it_is_installed(monkeypatch, installed):
    monkeypatch.setattr("distvsd.render.splat.find_spec", lambda name: object() if installed else None)
    assert splat_backend("auto", "fast", torch.device("cuda")) == ("gsplat" if installed else "torch")


@pytest.mark.parametrize(("numerics", "device"), [("exact", "cuda"), ("fast", "cpu")])
def test_gsplat_is_refused_where_it_cannot_serve(numerics, device):
    with pytest.raises(BackendError, match=r"render\.splat_backend"):
        splat_backend("gsplat", numerics, torch.device(device))


def test_a_missing_gsplat_is_said_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "gsplat", None)
    with pytest.raises(BackendError, match=r"pip install distvsd\[cuda\]"):
        splat(gaussians(), cameras(), 8, 8, "gsplat")
