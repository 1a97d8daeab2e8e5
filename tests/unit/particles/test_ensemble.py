"""The ensemble of a rank: its optimiser moves only what should move, and its state restores bit for bit."""

import pytest
import torch

from distvsd.errors import CheckpointError
from distvsd.particles.adam import ParticleAdam
from tests.unit.particles.shards import image, one_round, poisoned, shard


def ensemble(ids=(0, 1, 2), micro_batch=0):
    return shard(image(), ids, micro_batch=micro_batch)


def move(particles, step, poison=()):
    """Makes one update towards zero and returns it; the gradients of the particles `poison` are NaN."""
    return one_round(particles, step, gradient_of=lambda latents, ids: poisoned(latents, ids, poison))


def test_adam_takes_the_steps_of_torchs_adam():
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(4, 3, generator=generator)
    reference = [row.clone().requires_grad_() for row in value]
    optimizers = [torch.optim.Adam([row], lr=0.05, betas=(0.9, 0.99), eps=1e-8) for row in reference]
    mine = {"x": value.clone()}
    adam = ParticleAdam.zeros(mine, (0.9, 0.99), 1e-8)
    for step in range(6):
        gradient = torch.randn(4, 3, generator=generator)
        moves = torch.tensor([True, step % 2 == 0, step < 3, False])
        adam.step(mine, {"x": gradient}, {"x": 0.05}, moves)
        for row, optimizer in enumerate(optimizers):
            if moves[row]:
                reference[row].grad = gradient[row].clone()
                optimizer.step()
    torch.testing.assert_close(mine["x"], torch.stack([row.detach() for row in reference]), rtol=0, atol=1e-6)
    assert adam.count.tolist() == [6, 3, 3, 0]


def test_the_first_step_is_the_learning_rate_in_the_direction_of_the_gradient():
    parameters = {"x": torch.zeros(1, 2)}
    adam = ParticleAdam.zeros(parameters, (0.9, 0.99), 1e-15)
    adam.step(parameters, {"x": torch.tensor([[3.0, -0.001]])}, {"x": 0.1}, torch.tensor([True]))
    torch.testing.assert_close(parameters["x"], torch.tensor([[-0.1, 0.1]]))


def test_a_particle_with_a_nan_gradient_keeps_every_bit_and_the_others_move_as_without_it():
    together, without = ensemble(), ensemble((0, 2))
    before = {name: value.clone() for name, value in together.state()[1].items()}
    update = move(together, 0, poison=[1])
    move(without, 0)
    assert update.healthy == [0, 2] and update.unhealthy == [1]
    for name, value in together.state()[1].items():
        assert torch.equal(value, before[name]), name
    for particle_id in (0, 2):
        for name, value in together.state()[particle_id].items():
            assert torch.equal(value, without.state()[particle_id][name]), name


def test_grouping_changes_nothing():
    one_call, each_alone = ensemble(), ensemble(micro_batch=1)
    for step in range(3):
        move(one_call, step)
        move(each_alone, step)
    for particle_id in range(3):
        for name, value in one_call.state()[particle_id].items():
            torch.testing.assert_close(value, each_alone.state()[particle_id][name], rtol=0, atol=1e-7)


def test_state_restores_bit_for_bit_into_another_grouping():
    first, second = ensemble(), ensemble((2, 1), micro_batch=1)
    move(first, 0)
    for particle_id in (1, 2):
        second.load_state(particle_id, {name: value.clone() for name, value in first.state()[particle_id].items()})
    move(first, 1), move(second, 1)
    for particle_id in (1, 2):
        for name, value in first.state()[particle_id].items():
            assert torch.equal(value, second.state()[particle_id][name]), name


def test_a_state_of_another_shape_is_refused_by_name():
    wrong = {name: value.clone() for name, value in ensemble().state()[1].items()}
    wrong["param/image"] = torch.zeros(3, 8, 8)
    with pytest.raises(CheckpointError, match=r"particle 1: param/image .*\[3, 8, 8\].*\[3, 4, 4\].*resume"):
        ensemble().load_state(1, wrong)


def test_an_empty_shard_renders_and_updates_nothing():
    nobody = ensemble(())
    assert list(nobody.render(0, 4)) == [[]]
    assert move(nobody, 0).healthy == [] and nobody.state() == {}
