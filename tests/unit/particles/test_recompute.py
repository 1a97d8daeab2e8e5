"""Recomputed renders: the same bits, and less memory kept between the forward and the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from distvsd.faults import injected
from distvsd.particles import Ensemble
from tests.unit.particles.shards import AROUND, nerf, shard

IDS = (4, 9, 2)
SIZE = 12


def ensemble(recompute: bool, micro_batch: int = 1) -> Ensemble:
    return shard(nerf(), IDS, sampler=AROUND, views=2, micro_batch=micro_batch, recompute=recompute)


def update(particles: Ensemble, step: int) -> tuple[list[int], int]:
    """One round towards a fixed image: the ids that moved, and the bytes kept from the render to the backward pass."""
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parts = particles.render(step, SIZE)
    while True:
        with saved_tensors_hooks(count, lambda tensor: tensor):
            views = next(parts, None)
        if views is None:
            return particles.finish(step).healthy, sum(kept.values())
        latents = torch.cat([view.rendered.images.flatten(0, 1) for view in views])
        particles.update(views, latents, latents.detach() - 0.3, step)


def test_recomputed_renders_move_particles_by_the_same_bits_and_keep_a_small_part() -> None:
    kept, again = ensemble(recompute=False), ensemble(recompute=True)
    for step in (0, 1, 2):
        (moved, bytes_kept), (moved_again, bytes_again) = update(kept, step), update(again, step)
        assert moved == moved_again == list(IDS)
        assert bytes_again < 0.1 * bytes_kept
    for particle_id in IDS:
        for name, value in kept.parameters_of(particle_id).items():
            assert torch.equal(value, again.parameters_of(particle_id)[name])


def test_a_recomputed_render_that_does_not_fit_is_halved_like_any_other() -> None:
    particles = ensemble(recompute=True, micro_batch=0)
    with injected("oom@render:particle=9:nth=1"):
        moved, _ = update(particles, 0)
    assert sorted(moved) == sorted(IDS) and [group.own for group in particles.store.groups] == [[4], [9, 2]]
