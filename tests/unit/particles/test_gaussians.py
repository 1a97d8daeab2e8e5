"""Gaussian particles: their beginning, hand-over, gradients, growth, and what the ensemble makes of it."""

import dataclasses
import math

import pytest
import torch

from distvsd.cameras import Cameras
from distvsd.config import GaussiansConfig, HealthConfig
from distvsd.config.mesh import MeshConfig
from distvsd.errors import ConfigError
from distvsd.particles import GaussianParticle, Handed, Keys, MeshParticle
from distvsd.testing import check_particle
from tests.unit.particles.shards import AROUND, SMALL, image, nerf, one_round, shard

IDS = torch.tensor([4, 9, 2])
FEW = GaussiansConfig(capacity=60, init_color=1.0, relocate_every=2, min_opacity=0.05, noise=10.0)


def gaussians(config=FEW, rate=0.01, **fields):
    return GaussianParticle(config=dataclasses.replace(config, **fields), learning_rate=lambda step: rate)


def mesh():
    return MeshParticle(config=MeshConfig(grid=12), field_particle=nerf(), learning_rate=lambda step: 0.02)


def pushed(particles, rounds, first=0, towards=0.1):
    """Rounds in which every picture is pushed towards one grey level."""
    for step in range(first, first + rounds):
        one_round(particles, step, 16, lambda latents, ids: latents - towards)


def states(particles):
    return {i: {name: value.clone() for name, value in state.items()} for i, state in particles.state().items()}


def same(first, second):
    return all(torch.equal(value, second[i][name]) for i, state in first.items() for name, value in state.items())


def test_it_keeps_every_rule_of_particles():
    check_particle(gaussians(opacity=1.0, scale=1.0, sparsity=1.0, coverage=1.0))


def test_it_keeps_every_rule_where_it_begins_from_another_kind(monkeypatch):
    monkeypatch.setattr("distvsd.particles.gaussians._CELLS", 16)
    ids = torch.tensor([3, 0])
    source = Handed(nerf(), nerf().init(0, ids))
    check_particle(gaussians(), (3, 0), source=source)


def test_it_begins_as_an_even_ball_of_faint_gaussians():
    particle = gaussians(capacity=4000, init_radius=0.4, init_opacity=0.2)
    begun = particle.init(0, IDS)
    radius = begun["means"].norm(dim=-1)
    assert float(radius.max()) <= 0.4 + 1e-6
    assert float((radius < 0.2).float().mean()) == pytest.approx(1 / 8, abs=0.02)
    assert float(begun["means"].mean(1).abs().max()) < 0.02
    torch.testing.assert_close(begun["opacity_logits"].sigmoid(), torch.full((3, 4000), 0.2))
    # (4/3 pi 0.4^3 / 4000)^(1/3)
    assert begun["log_scales"].mean().exp() == pytest.approx(0.040612, rel=0.01)


def test_a_batch_draws_what_each_particle_draws_alone():
    particle, cameras = gaussians(), AROUND.sample(0, IDS, 0, 2, None)
    begun = particle.init(0, IDS)
    together = particle.render(begun, cameras, 16, Keys(0, IDS, 0))
    for row in range(3):
        one = slice(row, row + 1)
        alone = particle.render(
            {name: value[one] for name, value in begun.items()}, cameras[one], 16, Keys(0, IDS[one], 0)
        )
        torch.testing.assert_close(alone.images[0], together.images[row], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["means", "log_scales", "quaternions", "opacity_logits", "color_logits"])
def test_gradients_of_pictures_and_penalties_agree_with_finite_differences(name):
    particle = gaussians(capacity=4, opacity=1.0, scale=1.0, sparsity=1.0, coverage=1.0, coverage_range=(0.01, 0.02))
    ids = IDS[:1]
    cameras = AROUND.sample(0, ids, 0, 1, None)
    cameras = Cameras(*(getattr(cameras, field).double() for field in ("extrinsics", "fovy", "elevation", "azimuth")))
    begun = {key: value.double() for key, value in particle.init(0, ids).items()}

    def draw(value):
        out = particle.render(begun | {name: value}, cameras, 8, Keys(0, ids, 0))
        return out.images, out.penalty

    assert torch.autograd.gradcheck(draw, begun[name].requires_grad_(), eps=1e-7, atol=1e-5)


def test_the_density_is_that_of_the_light_it_stops():
    """The integral of the density along a line through the middle of one round gaussian is -log(1 - opacity)."""
    particle = gaussians(capacity=1)
    alone = {
        "means": torch.tensor([[[0.1, 0.2, 0.3]]]),
        "log_scales": torch.full((1, 1, 3), math.log(0.05)),
        "quaternions": torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]),
        "opacity_logits": torch.full((1, 1), math.log(0.7 / 0.3)),
        "color_logits": torch.zeros(1, 1, 3),
    }
    line = torch.linspace(-0.5, 0.5, 2001)
    points = alone["means"][0] + line[:, None] * torch.nn.functional.normalize(torch.tensor([1.0, -2.0, 0.5]), dim=0)
    density = particle.field(alone)(points[None])
    assert float(torch.trapezoid(density[0], line)) == pytest.approx(-math.log(0.3), rel=1e-4)
    assert particle.colors(alone, alone["means"])[0, 0].tolist() == pytest.approx([0.5] * 3)


def test_the_density_is_the_same_where_it_is_read_in_parts(monkeypatch):
    begun, particle = gaussians().init(0, IDS), gaussians()
    points = torch.rand(3, 50, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    whole = particle.field(begun)(points)
    monkeypatch.setattr("distvsd.particles.gaussians._TERMS", 1000)
    torch.testing.assert_close(particle.field(begun)(points), whole)


def test_what_is_handed_over_is_copied_for_the_same_size():
    source = Handed(gaussians(), gaussians().init(1, IDS))
    made = gaussians(init_radius=0.1).init(99, IDS, source)
    for name, value in made.items():
        assert torch.equal(value, source.parameters[name])
        assert value.untyped_storage().data_ptr() != source.parameters[name].untyped_storage().data_ptr()


def red_ball_field():
    """A radiance field with matter in a ball of radius 0.25 and nowhere else, and its parameters, red."""
    config = dataclasses.replace(SMALL, blob_density=40.0, blob_radius=0.25, density_scale=10.0, init_scale=0.0)
    particle = nerf(config)
    parameters = {name: value * 0 for name, value in particle.init(0, IDS).items()}
    parameters["decoder_bias"][:, 1:] = torch.tensor([3.0, -3.0, -3.0])
    return particle, parameters


def test_from_a_field_it_begins_where_the_field_has_matter_and_in_its_colours():
    made = gaussians(capacity=500).init(0, IDS, Handed(*red_ball_field()))
    radius = made["means"].norm(dim=-1)
    assert float((radius < 0.29).float().mean()) > 0.95 and float(radius.median()) == pytest.approx(0.2, abs=0.04)
    torch.testing.assert_close(made["color_logits"].mean(1), torch.tensor([[3.0, -3.0, -3.0]]).expand(3, 3))
    assert not torch.equal(made["means"][0], made["means"][1])


def test_gaussians_of_another_number_take_over_shape_and_colour(monkeypatch):
    monkeypatch.setattr("distvsd.particles.gaussians._CELLS", 24)
    first = gaussians(capacity=200).init(0, IDS, Handed(*red_ball_field()))
    made = gaussians(capacity=100).init(0, IDS, Handed(gaussians(capacity=200), first))
    assert float((made["means"].norm(dim=-1) < 0.4).float().mean()) > 0.9
    assert bool((made["color_logits"].mean(1).sign() == torch.tensor([1, -1, -1])).all())


def test_from_a_field_without_matter_it_begins_as_a_fog():
    particle, parameters = red_ball_field()
    empty = nerf(dataclasses.replace(particle.config, blob_density=-100.0))
    made = gaussians(capacity=1000, bound=0.5).init(0, IDS, Handed(empty, parameters))
    assert float(made["means"].abs().max()) <= 0.5 and float(made["means"].std()) == pytest.approx(0.2887, abs=0.01)


def test_from_a_mesh_it_begins_on_the_surface():
    source = mesh()
    before = source.init(0, IDS)
    made = gaussians(capacity=300).init(0, IDS, Handed(source, before))
    ball = source.field_particle.config.blob_radius
    assert float((made["means"].norm(dim=-1) - ball).abs().max()) < 0.05
    # (4 pi r^2 / 300)^(1/2)
    assert float(made["log_scales"].mean().exp()) == pytest.approx(ball * math.sqrt(4 * math.pi / 300), rel=0.05)
    torch.testing.assert_close(
        made["color_logits"].sigmoid(), source.surface(before, 4, 1.0).color(made["means"]), rtol=0, atol=1e-5
    )
    alone = gaussians(capacity=300).init(0, IDS[1:2], Handed(source, before).rows(slice(1, 2)))
    assert all(torch.equal(value[0], made[name][1]) for name, value in alone.items())


def test_from_an_empty_mesh_it_begins_as_a_fog():
    source = mesh()
    empty = source.init(0, IDS) | {"values": torch.full_like(source.init(0, IDS)["values"], -1.0)}
    made = gaussians(capacity=1000, bound=0.5).init(0, IDS, Handed(source, empty))
    assert float(made["means"].abs().max()) <= 0.5 and float(made["means"].std()) == pytest.approx(0.2887, abs=0.01)


def test_its_surface_is_where_its_density_has_the_threshold():
    particle = gaussians(capacity=500, bound=0.5)
    made = particle.init(0, IDS, Handed(*red_ball_field()))
    made["opacity_logits"][:] = 2.0
    surface = particle.surface(made, 24, 5.0)
    vertices = surface.meshes.one(0)[0]
    assert len(vertices) > 100
    density = particle.field({name: value[:1] for name, value in made.items()})(vertices[None])
    assert float((density.log() - math.log(5)).abs().median()) < 0.3
    red = surface.color(vertices[None].expand(3, -1, -1))[0]
    assert bool((red[:, 0] > 0.7).all())


def test_what_has_no_volume_is_refused():
    source = Handed(image(), image().init(0, IDS))
    with pytest.raises(ConfigError, match=r"ImageParticle.*GaussianParticle.*volume"):
        gaussians().init(0, IDS, source)


def test_a_relocation_keeps_the_picture_and_the_number():
    """Half of the gaussians are dead. On average pixels change by less than 1.5 of 255 grey levels, and by less than a
    fifth of what they would without the correction: Eq. 9 is exact along lines through the middles only."""
    particle = gaussians(capacity=200, relocate_every=1, noise=0.0, min_opacity=0.02)
    begun = particle.init(0, IDS)
    begun["opacity_logits"][:] = torch.linspace(-2, 2, 200)
    begun["opacity_logits"][:, ::2] = -9.0
    begun["color_logits"] += torch.randn(3, 200, 3, generator=torch.Generator().manual_seed(0))
    adapted = particle.adapt(begun, Keys(0, IDS, 0), torch.ones(3)).parameters
    assert {name: value.shape for name, value in adapted.items()} == {
        name: value.shape for name, value in begun.items()
    }
    assert bool((adapted["opacity_logits"].sigmoid() > 0.0199).all())
    source = (adapted["means"][:, :, None] == begun["means"][:, None]).all(-1).int().argmax(2)
    uncorrected = adapted | {
        "opacity_logits": begun["opacity_logits"].gather(1, source),
        "log_scales": begun["log_scales"].gather(1, source[..., None].expand(-1, -1, 3)),
    }
    cameras = AROUND.sample(0, IDS, 0, 2, None)
    before, after, without = (particle.view(p, cameras, 32, 0.5).images for p in (begun, adapted, uncorrected))
    changed, would_change = (float((images - before).abs().mean()) for images in (after, without))
    assert changed < 1.5 / 255 and changed < would_change / 5


def test_moments_restart_where_a_gaussian_moved_or_was_copied_and_only_there():
    particles = shard(gaussians(capacity=40, noise=0.0, relocate_every=3), [4, 9], views=1)
    pushed(particles, 2)
    faint = particles.parameters_of(4)["opacity_logits"]
    faint[:] = 0.0
    faint[5] = -9.0
    before = states(particles)
    pushed(particles, 1, first=2)
    after = particles.state()
    restarted = (after[4]["adam_v/means"] == 0).all(-1)
    assert restarted.sum() == 2 and bool(restarted[5])
    [other] = [n for n in restarted.nonzero().flatten().tolist() if n != 5]
    assert torch.equal(after[4]["param/means"][5], after[4]["param/means"][other])
    for name in ("log_scales", "quaternions", "opacity_logits", "color_logits"):
        zero = after[4][f"adam_v/{name}"].reshape(40, -1).eq(0).all(1)
        assert bool(zero[5]) and bool(zero[other])
    assert after[4]["adam_step"] == before[4]["adam_step"] + 1
    assert not (after[9]["adam_v/means"] == 0).all(-1).any()


def test_growth_does_nothing_between_its_rounds_without_noise():
    particle = gaussians(noise=0.0, relocate_every=5)
    begun = particle.init(0, IDS)
    found = [particle.adapt(begun, Keys(0, IDS, step), torch.ones(3)) for step in range(5)]
    assert [adapted is None for adapted in found] == [True, True, True, True, False]
    assert gaussians(noise=0.0, relocate_every=0).adapt(begun, Keys(0, IDS, 4), torch.ones(3)) is None


def test_growth_is_keyed_and_changes_no_argument():
    particle = gaussians(relocate_every=1)
    begun = particle.init(0, IDS)
    begun["opacity_logits"][:, ::3] = -9.0
    before = {name: value.clone() for name, value in begun.items()}

    def grown(seed=0, ids=IDS, step=0, rows=slice(None)):
        rows_of = {name: value[rows] for name, value in begun.items()}
        return particle.adapt(rows_of, Keys(seed, ids[rows], step), torch.ones(3)[rows]).parameters["means"]

    whole = grown()
    assert torch.equal(whole, grown())
    assert all(torch.equal(value, before[name]) for name, value in begun.items())
    for row in range(3):
        torch.testing.assert_close(grown(rows=slice(row, row + 1))[0], whole[row], rtol=0, atol=1e-6)
    for other in (grown(seed=1), grown(step=1), grown(ids=IDS + 1)):
        assert not torch.allclose(other, whole)


def test_the_noise_is_as_large_as_the_rate_of_the_particle():
    particle = gaussians(relocate_every=0)
    begun = particle.init(0, IDS)
    begun["opacity_logits"][:] = -9.0
    found = particle.adapt(begun, Keys(0, IDS, 0), torch.tensor([1.0, 0.5, 0.0])).parameters["means"] - begun["means"]
    spread = found.pow(2).mean((1, 2)).sqrt()
    assert float(spread[1] / spread[0]) == pytest.approx(0.5, abs=0.1) and float(spread[2]) == 0


def test_with_one_particle_a_group_a_particle_has_the_same_bits_alone_and_among_others():
    many = shard(gaussians(), [4, 9, 2], micro_batch=1)
    alone = shard(gaussians(), [9], micro_batch=1)
    for particles in (many, alone):
        pushed(particles, 5)
    assert same(states(alone), states(many))


def test_it_goes_on_with_the_same_bits_from_a_state_in_the_middle_of_growth():
    whole = shard(gaussians())
    pushed(whole, 3)
    resumed = shard(gaussians())
    health = whole.health()
    for particle_id, state in states(whole).items():
        resumed.load_state(particle_id, state, health[particle_id])
    for particles in (whole, resumed):
        pushed(particles, 4, first=3)
    assert same(states(resumed), states(whole))


def test_recomputed_renders_give_the_same_bits():
    particles = [shard(gaussians(), recompute=recompute) for recompute in (False, True)]
    for one in particles:
        pushed(one, 3)
    assert same(states(particles[0]), states(particles[1]))


def test_a_lost_particle_is_not_adapted_and_goes_back_and_no_other_bit_changes():
    sound, with_lost = (shard(gaussians(), micro_batch=1, health=HealthConfig(max_bad=3)) for _ in range(2))
    for particles in (sound, with_lost):
        pushed(particles, 1)
    with_lost.parameters_of(1)["means"][7, 2] = math.nan
    lost = states(with_lost)[1]
    for particles in (sound, with_lost):
        pushed(particles, 2, first=1)
    kept = with_lost.state()[1]
    assert all(torch.equal(value.nan_to_num(7), lost[name].nan_to_num(7)) for name, value in kept.items())
    for particles in (sound, with_lost):
        pushed(particles, 3, first=3)
    assert with_lost.health()[1]["restores"] == 1
    assert all(bool(value.isfinite().all()) for value in with_lost.state()[1].values())
    others = {i: state for i, state in states(sound).items() if i != 1}
    assert same(others, with_lost.state())


def test_a_kind_without_structure_keeps_its_bits():
    """`adapt` is an ability that a kind may have or not."""
    particles = shard(image())
    assert not hasattr(particles.particle, "adapt")
    assert one_round(particles, 0).healthy == [0, 1, 2]


def test_its_cost_counts_what_init_makes():
    cost = gaussians(capacity=1000).cost(64)
    assert (cost.trained, cost.frozen) == (14000, 0) and 1000 <= cost.points <= 1000 * 64 * 64
