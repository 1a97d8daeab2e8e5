"""Stores: a round touches only the groups that it leases, and a split group stays split for the rest of the run."""

import math

import pytest
import torch

from distvsd.config import HealthConfig, ParticlesConfig
from distvsd.particles import Ensemble, Resident
from tests.unit.particles.shards import FIXED, image, nerf, one_round, poisoned, shard

ROUNDS = 6


class Turns(Resident):
    """Even ids take part in even rounds and odd ids in odd ones. The state of the others is kept elsewhere, and
    their numbers on the device are NaN."""

    def __init__(self, particle, ids):
        super().__init__(particle, ids, ParticlesConfig(micro_batch=1), seed=7)
        self.away = {}
        self.commit(self.groups)

    def active(self, ids, step):
        return [particle_id for particle_id in ids if particle_id % 2 == step % 2]

    @torch.no_grad()
    def lease(self, step):
        leased = [group for group in self.groups if group.own[0] in self.active(self.ids, step)]
        for group in leased:
            for name, value in self.away.pop(group.own[0]).items():
                group.state_of(0)[name].copy_(value)
        return iter(leased)

    @torch.no_grad()
    def commit(self, groups):
        for group in groups:
            live = group.state_of(0)
            self.away[group.own[0]] = {name: value.clone() for name, value in live.items()}
            for value in live.values():
                value.fill_(math.nan if value.is_floating_point() else -1)

    def state_of(self, particle_id):
        return self.away.get(particle_id) or super().state_of(particle_id)

    def stream(self):
        for particle_id in self.ids:
            yield particle_id, self.state_of(particle_id)


def turns(ids, **limits):
    config = ParticlesConfig(health=HealthConfig(**limits))
    return Ensemble(Turns(image(), ids), FIXED, config)


def move(particles, step, poison=()):
    return one_round(particles, step, gradient_of=lambda latents, ids: poisoned(latents, ids, poison))


def test_a_round_moves_the_active_particles_and_touches_no_other():
    ids = (0, 1, 2, 5)
    particles = turns(ids)
    for step in range(ROUNDS):
        assert move(particles, step).healthy == [i for i in ids if i % 2 == step % 2]
    for particle_id, state in particles.stream():
        alone = shard(image(), [particle_id])
        for step in range(ROUNDS):
            if particle_id % 2 == step % 2:
                move(alone, step)
        assert state["adam_step"] == ROUNDS // 2
        for name, value in alone.state()[particle_id].items():
            assert torch.equal(state[name], value), name


def test_a_particle_that_rests_has_no_bad_round_and_keeps_its_good_state():
    particles = turns((0, 1), max_bad=2, good_every=2)
    for step in (0, 1):
        move(particles, step)
    good = {name: value.clone() for name, value in particles.state()[1].items()}
    assert [record["good"] for record in particles.health().values()] == ["present", "present"]
    assert move(particles, 2).absent == []
    assert {i: record["good"] for i, record in particles.health().items()} == {0: "beside", 1: "present"}
    for step in (3, 5):
        update = move(particles, step, poison=[1])
        move(particles, step + 1)
    assert update.restored == [1] and update.absent == [1]
    assert {i: record["total"] for i, record in particles.health().items()} == {0: 0, 1: 2}
    now = particles.state()[1]
    assert all(torch.equal(value, now[name]) for name, value in good.items())


def test_a_round_in_which_nothing_is_active_moves_nothing():
    particles = turns((0, 2))
    update = move(particles, 1)
    assert update.healthy == [] and update.absent == []


def test_a_resident_store_has_everything_active_in_groups_of_the_asked_size():
    store = Resident(image(), [4, 1, 7], ParticlesConfig(micro_batch=2), seed=7)
    assert store.active([4, 1, 7, 9], 0) == [4, 1, 7, 9]
    assert [group.own for group in store.lease(0)] == [[4, 1], [7]]
    assert [particle_id for particle_id, _ in store.stream()] == [4, 1, 7]


def test_a_split_group_is_leased_in_halves_on_the_same_memory_from_then_on():
    store = Resident(image(), [4, 1, 7], ParticlesConfig(), seed=7)
    [whole] = store.lease(0)
    halves = store.split(whole)
    assert [group.own for group in halves] == [[4], [1, 7]] == [group.own for group in store.lease(1)]
    halves[1].state_of(0)["param/image"].fill_(0.25)
    assert (whole.state_of(1)["param/image"] == 0.25).all()
    assert store.split(halves[0]) == [halves[0]]


def test_the_initial_state_of_a_particle_is_made_anew():
    store = Resident(nerf(), [4, 1], ParticlesConfig(), seed=7)
    expected = {name: value.clone() for name, value in store.state_of(1).items()}
    for value in store.state_of(1).values():
        value.fill_(3)
    for name, value in store.initial(1).items():
        assert torch.equal(value, expected[f"param/{name}"])


def test_a_particle_of_another_rank_is_refused_by_name():
    with pytest.raises(KeyError, match=r"particle 9 .*\[4, 1\]"):
        Resident(image(), [4, 1], ParticlesConfig(), seed=7).state_of(9)


def test_a_whole_shard_can_be_consumed_one_particle_after_the_other():
    particles = shard(image(), [4, 1])
    stream = particles.stream()
    first, state = next(stream)
    state["param/image"].fill_(0.5)
    assert first == 4 and (particles.parameters_of(4)["image"] == 0.5).all()
    assert [particle_id for particle_id, _ in stream] == [1]
    assert particles.num_bytes == 2 * (3 * 48 * 4 + 8)
