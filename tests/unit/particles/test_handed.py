"""What a stage hands over: particles of one kind and size go on, and everything else is refused by name."""

import dataclasses
import math

import pytest
import torch

from distvsd.config import HealthConfig, ImageConfig
from distvsd.errors import ConfigError
from distvsd.particles import Handed, ImageParticle
from tests.unit.particles.shards import SMALL, image, nerf, one_round, shard

IDS = torch.tensor([5, 2])


def handed(particle, ids=IDS):
    return Handed(particle, particle.init(1, ids))


@pytest.mark.parametrize("particle", [nerf(), image(), image((4, 2, 2))], ids=["nerf", "pixels", "latents"])
def test_the_next_stage_begins_with_the_same_bits_on_memory_of_its_own(particle):
    source = handed(particle)
    made = particle.init(99, IDS, source)
    assert list(made) == list(particle.init(0, IDS))
    before = {name: value.clone() for name, value in source.parameters.items()}
    for name, value in made.items():
        assert torch.equal(value, before[name])
        value.fill_(9.0)
    assert all(torch.equal(value, before[name]) for name, value in source.parameters.items())


def test_other_settings_that_change_no_size_take_the_parameters_over():
    other = nerf(dataclasses.replace(SMALL, samples_per_ray=4, density_scale=3.0, entropy=1.0))
    source = handed(nerf())
    assert torch.equal(other.init(0, IDS, source)["grid1"], source.parameters["grid1"])


def test_every_group_of_a_shard_takes_the_rows_of_its_own_particles():
    source = handed(nerf())
    particles = shard(nerf(), [5, 2], source=source, micro_batch=1)
    for row, particle_id in enumerate([5, 2]):
        assert torch.equal(particles.parameters_of(particle_id)["grid0"], source.parameters["grid0"][row])


def test_a_particle_that_keeps_failing_goes_back_to_what_was_handed_over():
    source = handed(image())
    particles = shard(image(), [5, 2], source=source, health=HealthConfig(max_bad=2))
    for step, factor in enumerate([1.0, math.nan, math.nan]):
        update = one_round(particles, step, gradient_of=lambda latents, ids, factor=factor: latents * factor)
    assert update.restored == [5, 2]
    assert torch.equal(particles.parameters_of(2)["image"], source.parameters["image"][1])


SAME_SHAPE = ImageParticle(config=ImageConfig(space="latent"), shape=(3, 4, 4), learning_rate=lambda step: 0.1)


@pytest.mark.parametrize(
    ("source", "particle", "said"),
    [
        (nerf(), image(), "NerfParticle.*ImageParticle.*kinds"),
        (image(), nerf(), "ImageParticle.*NerfParticle.*kinds"),
        (image(), SAME_SHAPE, "kinds"),
        (nerf(), nerf(dataclasses.replace(SMALL, features=4)), r"grid0 \[2, 4, 4, 4\] to \[4, 4, 4, 4\]"),
        (nerf(), nerf(dataclasses.replace(SMALL, background="none")), r"background_bias0 \[16\] to missing"),
        (nerf(dataclasses.replace(SMALL, levels=1)), nerf(), r"grid1 missing to \[2, 8, 8, 8\]"),
    ],
)
def test_a_source_of_another_kind_or_size_is_refused(source, particle, said):
    with pytest.raises(ConfigError, match=said):
        shard(particle, [5, 2], source=handed(source))
