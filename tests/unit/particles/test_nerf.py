"""Radiance-field particles: initial state, renders, gradients, and independence of each other."""

import dataclasses
import math

import pytest
import torch

from distvsd.cameras import Cameras
from distvsd.particles import Keys
from distvsd.render.volume import Composited
from tests.unit.particles.shards import AROUND, nerf

NERF = nerf()
IDS = torch.tensor([4, 9, 2])


def replace(particle, **fields):
    """The same particle with other values in its configuration."""
    return dataclasses.replace(particle, config=dataclasses.replace(particle.config, **fields))


def scene(particle=NERF, ids=IDS, views=2, step=0):
    return particle.init(0, ids), AROUND.sample(0, ids, step, views, None), Keys(0, ids, step)


def double(cameras):
    return Cameras(*(getattr(cameras, name).double() for name in ("extrinsics", "fovy", "elevation", "azimuth")))


def test_the_object_begins_as_a_soft_ball_of_radius_one_half():
    parameters = {name: value * 0 for name, value in NERF.init(0, IDS).items()}
    radius = torch.tensor([0.0, 0.25, 0.5, 0.6])
    points = torch.stack((radius, 0 * radius, 0 * radius), dim=-1).expand(3, 4, 3)
    density, colour = NERF.evaluate(parameters, points)
    # softplus(10 (1 - r / 0.5)): 10.00005, 5.0067, 0.6931, 0.1269
    torch.testing.assert_close(density[0], torch.tensor([10.00005, 5.00672, 0.69315, 0.12693]), rtol=1e-4, atol=0)
    torch.testing.assert_close(colour, torch.full_like(colour, 0.5))


def test_the_density_scale_multiplies_the_density_and_leaves_the_colour():
    parameters, *_ = scene()
    points = torch.linspace(-0.5, 0.5, 36).reshape(3, 4, 3)
    (density, colour), (scaled, same) = (
        n.evaluate(parameters, points) for n in (NERF, replace(NERF, density_scale=6.0))
    )
    torch.testing.assert_close(scaled, 6 * density)
    assert torch.equal(colour, same)


def test_a_scene_begins_hollow_around_the_camera():
    hollow = replace(NERF, blob_density=-10.0, blob_radius=2.5, bound=4.0)
    parameters = {name: value * 0 for name, value in hollow.init(0, IDS).items()}
    points = torch.tensor([[0.0, 0, 0], [3.5, 0, 0]]).expand(3, 2, 3)
    density, _ = hollow.evaluate(parameters, points)
    # softplus(-10) = 4.5e-5 at the centre; softplus(-10 (1 - 1.4)) = softplus(4) = 4.018 outside.
    torch.testing.assert_close(density[0], torch.tensor([4.54e-5, 4.01815]), rtol=1e-3, atol=0)


def test_an_object_begins_in_the_middle_of_a_hollow_scene():
    """The paper's numbers: of 10 (1 - r / 0.5) and -10 (1 - r / 2.5) the first is larger inside r = 5/6, where both are
    -20/3. softplus(-20/3) = 1.2718e-3, softplus(-6) = 2.4757e-3."""
    mixed = replace(NERF, init="object_in_scene", bound=4.0)
    parameters = {name: value * 0 for name, value in mixed.init(0, IDS).items()}
    radius = torch.tensor([0.0, 0.5, 0.8, 5 / 6, 1.0, 2.5, 3.5])
    density, _ = mixed.evaluate(parameters, torch.stack((0 * radius, radius, 0 * radius), dim=-1).expand(3, 7, 3))
    expected = torch.tensor([10.00005, 0.69315, 2.4757e-3, 1.2718e-3, 2.4757e-3, 0.69315, 4.01815])
    torch.testing.assert_close(density[0], expected, rtol=1e-3, atol=0)


def test_no_two_particles_begin_alike():
    rendered = NERF.view(*scene(views=1)[:2], 16, 0.5).images
    assert not torch.allclose(rendered[0], rendered[1], atol=1e-4)


def test_one_call_renders_every_particle_from_every_view():
    parameters, cameras, keys = scene()
    rendered = NERF.render(parameters, cameras, 24, keys)
    assert rendered.images.shape == (3, 2, 3, 24, 24)
    assert rendered.opacity.shape == (3, 2, 1, 24, 24) and rendered.penalty.shape == (3,)
    assert rendered.images.min() >= 0 and rendered.images.max() <= 1
    # The ball fills the middle of the picture and not its corners.
    assert rendered.opacity[..., 12, 12].min() > 0.9 and rendered.opacity[..., 0, 0].max() < 0.5


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_a_particles_render_does_not_depend_on_its_neighbours(noise):
    particle = replace(NERF, density_noise=noise)
    parameters, cameras, keys = scene(particle)
    together = particle.render(parameters, cameras, 16, keys).images
    alone = particle.render(
        {name: value[1:2] for name, value in parameters.items()}, cameras[1:2], 16, Keys(0, IDS[1:2], 0)
    ).images
    torch.testing.assert_close(together[1], alone[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("entropy_of", ["opacity", "weights"])
def test_gradients_agree_with_finite_differences(entropy_of):
    small = replace(
        NERF,
        levels=1,
        base_resolution=3,
        max_resolution=3,
        smoothstep=True,
        samples_per_ray=6,
        entropy=1.0,
        entropy_of=entropy_of,
        sparsity=1.0,
        coverage=1.0,
        coverage_range=(0.01, 0.02),
    )
    parameters, cameras, keys = scene(small, torch.tensor([4]), views=1)
    leaves = {name: value.double().requires_grad_() for name, value in parameters.items()}
    names, cameras = list(leaves), double(cameras)

    def draw(*values):
        out = small.render(dict(zip(names, values, strict=True)), cameras, 4, keys)
        return out.images, out.penalty

    assert torch.autograd.gradcheck(draw, tuple(leaves.values()), eps=1e-6, atol=1e-6)


def test_gradients_of_the_batch_are_those_of_each_particle():
    parameters, cameras, keys = scene()
    upstream = torch.randn(3, 2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    (NERF.render(leaves, cameras, 16, keys).images * upstream).sum().backward()
    for row in range(3):
        mine = {name: value[row : row + 1].clone().requires_grad_() for name, value in parameters.items()}
        one = NERF.render(mine, cameras[row : row + 1], 16, Keys(0, IDS[row : row + 1], 0))
        (one.images * upstream[row : row + 1]).sum().backward()
        for name, value in mine.items():
            torch.testing.assert_close(leaves[name].grad[row], value.grad[0], rtol=1e-4, atol=1e-5)


def test_backgrounds_are_plain_in_the_asked_share_and_learned_otherwise():
    ids = torch.arange(200)
    empty = replace(
        NERF,
        blob_density=-1000.0,
        blob_radius=10.0,
        levels=1,
        features=1,
        base_resolution=2,
        max_resolution=2,
        samples_per_ray=2,
    )
    parameters, cameras, keys = scene(empty, ids, views=1)
    images = empty.render(parameters, cameras, 8, keys).images[:, 0]
    is_plain = (images.flatten(2).std(-1) < 1e-6).all(1)
    # 200 draws at one half: within five standard deviations (35).
    assert 65 <= is_plain.sum() <= 135
    grey = (
        replace(empty, random_background=1.0, random_background_kind="grey").render(parameters, cameras, 8, keys).images
    )
    assert (grey.std(2) < 1e-6).all() and grey[:, 0, 0, 0, 0].std() > 0.2


def drawn(opacity):
    """The input of the penalty for an opacity `[P, V, H, W, 1]`, with one sample a ray."""
    weights = opacity
    return Composited(torch.zeros(*opacity.shape[:-1], 3), opacity, weights, torch.zeros_like(weights))


def test_penalties_prefer_clear_or_solid_pixels():
    entropy = replace(NERF, entropy=1.0)
    opacity = torch.tensor([[0.5], [0.0], [1.0]]).reshape(3, 1, 1, 1, 1).expand(3, 1, 4, 4, 1)
    penalty = entropy.penalty(drawn(opacity), 3)
    assert penalty[0].item() == pytest.approx(math.log(2), abs=1e-5)
    assert penalty[1:].max() < 2e-4


def test_the_papers_entropy_is_the_bits_of_each_samples_weight():
    # Two rays of four samples. The paper's code: mean over samples of -w log2 w - (1 - w) log2 (1 - w), w clamped.
    weights = torch.tensor([[0.5, 0.25, 0.0, 0.0], [0.125, 0.0, 0.875, 0.0]])
    # Bits of 1/2: 1; of 1/4: 0.811278; of 1/8 and 7/8: 0.543564 each; of the clamped 0: 1.8052e-4 each.
    expected = (1 + 0.811278 + 2 * 0.543564 + 4 * 1.8052e-4) / 8
    opacity = weights.sum(1).reshape(1, 1, 1, 2, 1)
    rendered = Composited(torch.zeros(1, 1, 1, 2, 3), opacity, weights.reshape(1, 1, 1, 2, 4), torch.zeros(4))
    penalty = replace(NERF, entropy=10.0, entropy_of="weights").penalty(rendered, 1)
    assert penalty.item() == pytest.approx(10 * expected, abs=1e-4)
    # The entropy of the rays' opacities, 3/4 and 1, in nats: (0.562335 + 1.2513e-4) / 2.
    of_rays = replace(NERF, entropy=10.0).penalty(rendered, 1)
    assert of_rays.item() == pytest.approx(10 * (0.562335 + 1.2513e-4) / 2, abs=1e-4)


def test_sparsity_clears_fog_and_neither_thins_what_is_solid_nor_lets_a_particle_fade():
    # Row 0: a quarter of the rays solid, a quarter fog, the rest clear. Row 1: the same, ten times fainter.
    rays = torch.tensor([1.0, 0.1, 0.0, 0.0])
    opacity = torch.stack((rays, rays / 10)).reshape(2, 1, 2, 2, 1).requires_grad_()
    penalty = replace(NERF, sparsity=2.0).penalty(drawn(opacity), 2)
    # Mean 0.275, mean square 0.2525 (+ 0.0001): 2 * 0.275 / 0.50259 = 1.0943.
    assert penalty[0].item() == pytest.approx(1.0943, abs=1e-4)
    (gradient,) = torch.autograd.grad(penalty.sum(), opacity)
    solid, fog, *_ = gradient[0].flatten()
    # 2 / (4 * 0.50259) * (1 - o * 0.275 / 0.2526): -0.0882 for solid rays, 0.8865 for fog.
    assert (solid.item(), fog.item()) == pytest.approx((-0.0882, 0.8865), abs=1e-3)
    # Ten times fainter: 2 * 0.0275 / sqrt(0.002525 + 0.0001) = 1.0735; a plain mean would fall to a tenth.
    assert penalty[1].item() == pytest.approx(1.0735, abs=1e-4)
    assert replace(NERF, sparsity=2.0).penalty(drawn(torch.zeros(1, 1, 2, 2, 1)), 1).item() == 0


def test_coverage_asks_only_of_objects_that_cover_too_much_or_too_little_of_their_view():
    # Mean coverage: 0.95, 0.6 and 0.025.
    rays = [[1.0, 0.9, 0.9, 1.0], [1.0, 1.0, 0.4, 0.0], [0.05, 0.05, 0.0, 0.0]]
    opacity = torch.tensor(rays).reshape(3, 1, 2, 2, 1).requires_grad_()
    penalty = replace(NERF, coverage=3.0, coverage_range=(0.1, 0.8)).penalty(drawn(opacity), 3)
    # 3 log(0.2 / 0.0501) = 4.1529 and 3 log(0.1 / 0.0251) = 4.1469.
    assert penalty.tolist() == pytest.approx([4.1529, 0, 4.1469], abs=1e-3)
    (gradient,) = torch.autograd.grad(penalty.sum(), opacity)
    # The derivative on every ray: 3 / (4 * 0.0501) in row 0, 0 in row 1, -3 / (4 * 0.0251) in row 2.
    expected = torch.tensor([14.970, 0.0, -29.880])
    torch.testing.assert_close(gradient.reshape(3, 4), expected[:, None].expand(3, 4), rtol=1e-3, atol=0)


@pytest.mark.parametrize("density", [12.0, -12.0])
@pytest.mark.parametrize(("asked", "mends"), [({"sparsity": 100.0}, False), ({"coverage": 30.0}, True)])
def test_what_fills_the_view_or_has_faded_away_comes_back_by_coverage_and_is_not_seen_by_sparsity(
    density, asked, mends
):
    # Density 12 everywhere lets less than a hundredth of the light through; softplus(-12) is 6e-6.
    grid = {"levels": 1, "base_resolution": 4, "max_resolution": 4}
    particle = replace(NERF, **grid, blob_density=density, blob_radius=1e3, bound=0.9, **asked)
    parameters, cameras, keys = scene(particle)
    leaves = {name: value.requires_grad_() for name, value in parameters.items()}
    optimizer = torch.optim.Adam(leaves.values(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        particle.render(leaves, cameras, 12, keys).penalty.sum().backward()
        optimizer.step()
    opacity = particle.render(leaves, cameras, 12, keys).opacity.flatten(1).mean(1)
    if mends:
        assert ((opacity > 0.08) & (opacity < 0.75)).all()
    else:
        assert (opacity > 0.97).all() if density > 0 else (opacity < 0.01).all()


def test_the_view_for_evaluation_draws_nothing_random():
    parameters, cameras, _ = scene()
    first, second = (NERF.view(parameters, cameras, 16, 0.3).images for _ in range(2))
    assert torch.equal(first, second)
    corner = first[..., 0, 0]
    opacity = NERF.view(parameters, cameras, 16, 0.3).opacity[..., 0, 0]
    assert ((corner - 0.3).abs() <= opacity + 1e-6).all()
