"""Parameters that are handed over and then frozen: no gradient, no optimiser state, and still saved and restored."""

import math

import pytest
import torch

from distvsd.config import HealthConfig, ParticlesConfig
from distvsd.errors import ConfigError
from distvsd.faults import injected
from distvsd.particles import Cost, Ensemble, Handed, Resident
from distvsd.particles.stored import blank_state
from distvsd.testing import check_particle
from tests.unit.particles.shards import AROUND, image, nerf, one_round, shard
from tests.unit.particles.voxels import EDGE, SAMPLES, TintedVoxels

VOXELS = TintedVoxels()
IDS = (3, 0, 11)
PLAIN = {"param/density", "param/color", "adam_m/color", "adam_v/color", "adam_step"}


def source(ids=IDS, particle=None):
    particle = particle or nerf()
    return Handed(particle, particle.init(7, torch.tensor(ids)))


def voxels(ids=IDS, **fields):
    health = HealthConfig(max_bad=2, max_restores=1, restore_rate=0.5)
    return shard(VOXELS, ids, sampler=AROUND, source=source(ids), health=health, **fields)


def move(particles, step, poison=False):
    """Makes one update towards black and returns it; with `poison` all gradients are NaN."""
    return one_round(particles, step, 8, lambda latents, ids: latents * (math.nan if poison else 1))


def copies(particles):
    return {i: {name: value.clone() for name, value in state.items()} for i, state in particles.stream()}


def test_a_kind_with_a_frozen_part_that_is_handed_over_conforms():
    check_particle(VOXELS, IDS, source=source(), frozen={"density"})


def test_the_density_is_that_of_the_field_that_was_handed_over_particle_by_particle():
    handed = source()
    corner = torch.full((3, 1, 3), -0.6)
    expected = nerf().field(handed.parameters)(corner)
    particles = voxels()
    for row, particle_id in enumerate(IDS):
        torch.testing.assert_close(particles.parameters_of(particle_id)["density"][0, 0, 0], expected[row, 0])


def test_an_update_moves_what_is_trained_and_no_bit_of_what_is_frozen():
    particles = voxels()
    before = copies(particles)
    assert move(particles, 0).healthy == list(IDS)
    for particle_id, state in particles.stream():
        assert torch.equal(state["param/density"], before[particle_id]["param/density"])
        assert not torch.equal(state["param/color"], before[particle_id]["param/color"])


def test_a_frozen_parameter_has_no_moments_and_no_copy_among_the_good_states():
    particles = voxels()
    particles.mark_good()
    assert all(set(state) == PLAIN for _, state in particles.stream())
    move(particles, 0)
    beside = {f"good/{name}" for name in PLAIN - {"param/density"}}
    assert all(set(state) == PLAIN | beside for _, state in particles.stream())
    assert {name: value.shape for name, value in blank_state(VOXELS).items()} == {
        name: value.shape for name, value in next(voxels().stream())[1].items()
    }


def test_a_restored_shard_goes_on_by_the_same_bits_in_another_grouping():
    first, second = voxels(), voxels(micro_batch=1)
    first.mark_good()
    move(first, 0)
    health = first.health()
    for particle_id, state in copies(first).items():
        second.load_state(particle_id, state, health[particle_id])
    for step, poison in ((1, False), (2, True), (3, True), (4, False)):
        assert move(first, step, poison).restored == move(second, step, poison).restored == (list(IDS) * (step == 3))
    for (_, ours), (_, theirs) in zip(first.stream(), second.stream(), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-6)


def test_a_blank_shard_needs_no_source_to_be_restored():
    saved = copies(voxels())
    blank = Ensemble(Resident(VOXELS, IDS, ParticlesConfig(), seed=7, blank=True), AROUND, ParticlesConfig())
    assert not any(value.any() for _, state in blank.stream() for value in state.values())
    for particle_id, state in saved.items():
        blank.load_state(particle_id, state)
        assert all(torch.equal(value, state[name]) for name, value in blank.store.state_of(particle_id).items())


def test_a_particle_that_was_never_marked_good_begins_anew_from_what_was_handed_over():
    particles = voxels()
    start = copies(particles)
    for step, poison in enumerate([False, True, True]):
        update = move(particles, step, poison)
    assert update.restored == list(IDS)
    for particle_id, state in particles.stream():
        assert all(torch.equal(value, start[particle_id][name]) for name, value in state.items())


def test_a_group_that_is_halved_keeps_its_frozen_part_frozen():
    particles, whole = voxels(), voxels()
    with injected("oom@render:particle=0:nth=1"):
        move(particles, 0)
    move(whole, 0)
    assert [group.own for group in particles.store.groups] == [[3], [0, 11]]
    for group in particles.store.groups:
        assert not group.parameters["density"].requires_grad and group.parameters["color"].requires_grad
    for (_, ours), (_, theirs) in zip(particles.stream(), whole.stream(), strict=True):
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-6)


def test_the_cost_counts_what_is_trained_and_what_is_frozen():
    assert VOXELS.cost(10) == Cost(trained=3, frozen=EDGE**3, points=100 * SAMPLES)


def test_without_a_source_it_is_refused_and_so_is_a_source_without_a_volume():
    with pytest.raises(ConfigError, match="stage before"):
        shard(VOXELS, IDS)
    with pytest.raises(ConfigError, match=r"ImageParticle.*TintedVoxels.*no volume"):
        shard(VOXELS, IDS, source=source(particle=image()))
