"""Mesh particles: how they begin, what of them is trained, what the prior sees, and what happens without a surface."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from distvsd.cameras import OrbitSampler
from distvsd.config import CamerasConfig, NerfConfig
from distvsd.config.mesh import MeshConfig
from distvsd.config.particles import ImageConfig
from distvsd.errors import ConfigError
from distvsd.particles import Handed, ImageParticle, Keys, MeshParticle, NerfParticle, Parameters, Rendered
from distvsd.testing import check_particle

NERF = NerfConfig(
    levels=2,
    features=2,
    base_resolution=4,
    max_resolution=8,
    samples_per_ray=8,
    bound=0.6,
    blob_radius=0.35,
    init_color=2.0,
)
FIELD = NerfParticle(config=NERF, learning_rate=lambda step: 0.01, network_learning_rate=lambda step: 0.001)
IDS = torch.tensor([4, 1])
SAMPLER = OrbitSampler(CamerasConfig())


def mesh(field: NerfParticle = FIELD, **fields: Any) -> MeshParticle:
    config = MeshConfig(**{"grid": 10} | fields)
    return MeshParticle(config=config, field_particle=field, learning_rate=lambda step: 0.02)


def handed(ids: Tensor = IDS) -> Handed:
    return Handed(FIELD, FIELD.init(0, ids))


def render(particle: MeshParticle, parameters: Parameters, step: int = 0) -> Rendered:
    cameras = SAMPLER.sample(0, IDS, step, 2, None)
    return particle.render(parameters, cameras, 24, Keys(0, IDS, step))


def view(particle: MeshParticle, parameters: Parameters) -> Rendered:
    return particle.view(parameters, SAMPLER.sample(0, IDS, 0, 2, None), 24, 0.5)


@pytest.mark.parametrize("signal", ["color", "normal", "shaded"])
def test_meshes_conform(signal: Literal["color", "normal", "shaded"]) -> None:
    colors = list(FIELD.learning_rates(0))
    plain = dataclasses.replace(NERF, background="none", random_background_kind="grey")
    field = dataclasses.replace(FIELD, config=plain)
    frozen = [name for name in colors if not name.startswith("background")]
    # A trained surface and frozen colours, from a field of the stage before.
    source = Handed(field, field.init(0, torch.tensor([3, 0, 11])))
    check_particle(mesh(field, signal=signal, normal_consistency=1, laplacian=1), source=source, frozen=frozen)


def test_meshes_with_trained_colours_conform() -> None:
    check_particle(mesh(trained="both"))
    check_particle(mesh(trained="texture"), frozen=["values", "offsets"])


def test_without_a_stage_before_it_begins_as_the_ball_of_the_field() -> None:
    particle = mesh(grid=24)
    surface = particle.surface(particle.init(0, IDS), 0, 0)
    distance = surface.meshes.vertices.norm(dim=1)
    torch.testing.assert_close(distance, torch.full_like(distance, NERF.blob_radius), atol=0.004, rtol=0)


def test_from_a_field_it_has_the_surface_at_the_threshold_and_the_same_colours() -> None:
    """density = softplus(10 (1 - r / 0.35)) without its grid: 5 where 10 (1 - r / 0.35) = log(e^5 - 1)."""
    source = handed()
    for name in source.parameters:
        if name.startswith("grid"):
            source.parameters[name].zero_()
    particle = mesh(grid=24, threshold=5)
    parameters = particle.init(0, IDS, source)
    surface = particle.surface(parameters, 0, 0)
    expected = 0.35 * (1 - math.log(math.exp(5) - 1) / 10)
    distance = surface.meshes.vertices.norm(dim=1)
    torch.testing.assert_close(distance, torch.full_like(distance, expected), atol=0.004, rtol=0)
    points = torch.rand(2, 50, 3) - 0.5
    assert torch.equal(surface.color(points), FIELD.evaluate(source.parameters, points)[1])


def test_what_is_handed_over_is_a_copy() -> None:
    source = handed()
    before = {name: value.clone() for name, value in source.parameters.items()}
    for value in mesh().init(0, IDS, source).values():
        value.zero_()
    assert all(torch.equal(before[name], source.parameters[name]) for name in before)


def test_texture_begins_with_the_mesh_of_the_geometry_stage() -> None:
    geometry, texture = mesh(), mesh(trained="texture")
    parameters = geometry.init(0, IDS, handed())
    parameters["offsets"] += 0.1
    after = texture.init(0, IDS, Handed(geometry, parameters))
    assert all(torch.equal(after[name], parameters[name]) for name in parameters)


@pytest.mark.parametrize(
    ("particle", "source"),
    [
        (mesh(), Handed(ImageParticle(config=ImageConfig(), shape=(3, 8, 8), learning_rate=lambda step: 0.1), {})),
        (mesh(), Handed(mesh(grid=8), mesh(grid=8).init(0, IDS))),
        (mesh(dataclasses.replace(FIELD, config=dataclasses.replace(NERF, features=3))), handed()),
    ],
    ids=["an image", "another lattice", "a field of other sizes"],
)
def test_what_it_cannot_begin_from_is_refused(particle: MeshParticle, source: Handed) -> None:
    with pytest.raises(ConfigError, match="cannot be handed over"):
        particle.init(0, IDS, source)


def test_geometry_moves_the_surface_texture_the_colours_and_both_all() -> None:
    colors = set(FIELD.learning_rates(0))
    assert set(mesh().learning_rates(0)) == {"values", "offsets"}
    assert set(mesh(trained="texture").learning_rates(0)) == colors
    assert set(mesh(trained="both").learning_rates(0)) == {"values", "offsets"} | colors


def test_one_small_step_along_the_gradient_of_the_opacity_makes_the_surface_smaller() -> None:
    particle = mesh()
    parameters = {name: value.requires_grad_() for name, value in particle.init(0, IDS).items()}
    opacity = render(particle, parameters).opacity.mean()
    opacity.backward()
    with torch.no_grad():
        for name in ("values", "offsets"):
            gradient = parameters[name].grad
            assert gradient is not None
            parameters[name] -= 3 * gradient / gradient.norm()
    assert render(particle, parameters).opacity.mean() < opacity


def test_normals_are_shown_as_colours() -> None:
    """A ball from outside: the normal at the middle of a view points to the camera."""
    particle = mesh(signal="normal", grid=24)
    cameras = SAMPLER.sample(0, IDS, 0, 1, None)
    image = particle.render(particle.init(0, IDS), cameras, 33, Keys(0, IDS, 0)).images[:, 0, :, 16, 16]
    position = torch.nn.functional.normalize(cameras.extrinsics[:, 0, :3, 3], dim=1)
    torch.testing.assert_close(image, position * 0.5 + 0.5, atol=0.06, rtol=0)


def test_shading_darkens_colours_on_the_side_away_from_the_light() -> None:
    """Light from straight above: colours seen from above are as they are, below they keep the ambient share."""
    plain, lit = mesh(), mesh(signal="shaded", light=(0, 90), ambient=0.25)
    parameters = plain.init(0, IDS)
    cameras = OrbitSampler(CamerasConfig(elevation=(85, 86))).sample(0, IDS, 0, 1, None)
    below = OrbitSampler(CamerasConfig(elevation=(-86, -85))).sample(0, IDS, 0, 1, None)
    keys = Keys(0, IDS, 0)
    middle = (slice(None), 0, slice(None), 12, 12)
    for views, share in ((cameras, 1.0), (below, 0.25)):
        colors, shaded = (kind.render(parameters, views, 24, keys).images[middle] for kind in (plain, lit))
        torch.testing.assert_close(shaded, share * colors, atol=0.02, rtol=0)


@pytest.mark.parametrize("broken", ["empty", "not finite"])
def test_a_particle_without_a_usable_mesh_is_not_a_number_and_the_others_are_as_alone(broken: str) -> None:
    particle = mesh(trained="both")
    parameters = particle.init(0, IDS)
    expected = render(particle, parameters)
    if broken == "empty":
        parameters["values"][0] = -1
    else:
        parameters["values"][0, int(particle.init(0, IDS)["values"][0].argmax())] = torch.nan
    found = render(particle, {name: value.requires_grad_() for name, value in parameters.items()})
    assert found.images[0].isnan().all()
    torch.testing.assert_close(found.images[1], expected.images[1])
    found.images[1].sum().backward()
    assert all(value.grad is None or value.grad[1].isfinite().all() for value in parameters.values())


def test_an_empty_mesh_shows_the_background_when_it_is_looked_at() -> None:
    particle = mesh()
    parameters = particle.init(0, IDS)
    parameters["values"][:] = -1
    seen = view(particle, parameters)
    assert torch.equal(seen.images, torch.full_like(seen.images, 0.5))
    assert not seen.opacity.any()


def test_a_field_too_thin_for_any_threshold_gives_an_empty_mesh_and_others_keep_theirs() -> None:
    source = handed()
    source.parameters["decoder_bias"][0, 0] = -40
    particle = mesh()
    meshes = particle.surface(particle.init(0, IDS, source), 0, 0).meshes
    assert meshes.face_ends[0] == 0 < meshes.face_ends[1]


def test_regularisers_are_only_paid_where_the_surface_is_trained() -> None:
    weights = {"normal_consistency": 2.0, "laplacian": 3.0}
    bent, frozen = mesh(**weights), mesh(trained="texture", **weights)
    parameters = bent.init(0, IDS)
    assert (render(bent, parameters).penalty > 0).all()
    assert not render(frozen, parameters).penalty.any()


def test_offsets_keep_the_points_of_the_lattice_within_half_a_cell() -> None:
    particle = mesh()
    parameters = particle.init(0, IDS)
    still = particle.surface(parameters, 0, 0).meshes.vertices
    parameters["offsets"][:] = 1e6
    moved = particle.surface(parameters, 0, 0).meshes.vertices
    torch.testing.assert_close(moved - still, torch.full_like(still, 0.5 * 2 / 10 * NERF.bound), atol=1e-5, rtol=0)
