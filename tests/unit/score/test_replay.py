"""The replay buffer, and the on-policy lag measured with it."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from distvsd.errors import CheckpointError
from distvsd.score.replay import Replay, on_policy_lag
from distvsd.vsd.samples import Samples


def gathered(round: int, count: int = 4, size: int = 2, masked: tuple[int, ...] = ()) -> Samples:
    """Samples that can be told apart: latents of row i of a round are all 100 * round + i."""
    value = 100.0 * round + torch.arange(count)
    weight = torch.ones(count)
    weight[list(masked)] = 0
    return Samples(
        latents=value[:, None, None, None].expand(count, 1, size, size).clone(),
        cameras=value[:, None].expand(count, 16).clone(),
        ids=torch.arange(count),
        views=torch.zeros(count, dtype=torch.int64),
        weight=weight,
    )


def names(samples: Samples | None) -> list[int]:
    assert samples is not None
    return [int(value) for value in samples.cameras[:, 0]]


def filled(rounds: int = 3, last: int = 5) -> Replay:
    replay = Replay(rounds)
    for round in range(last + 1):
        replay.push(gathered(round, masked=(1,)), round)
    return replay


def test_the_ring_keeps_the_last_rounds_without_masked_samples():
    replay = filled()
    assert replay.rounds == [3, 4, 5] and len(replay) == 9
    assert names(replay.oldest()) == [300, 302, 303]
    drawn = set(names(replay.draw(500, 1, 6)))
    assert drawn == {300, 302, 303, 400, 402, 403, 500, 502, 503}


def test_an_empty_ring_has_no_oldest_and_cannot_be_drawn_from():
    replay = Replay(3)
    replay.push(gathered(0, masked=(0, 1, 2, 3)), 0)
    assert replay.oldest() is None and len(replay) == 0
    with pytest.raises(ValueError, match="empty"):
        replay.draw(1, 0, 0)
    off = Replay(0)
    off.push(gathered(0), 0)
    assert off.oldest() is None


def test_draws_depend_only_on_the_content_and_the_key():
    one, other = filled(), filled()
    other.draw(7, 1, 2)
    first = names(one.draw(6, seed=1, round=6, lane=2))
    assert names(other.draw(6, seed=1, round=6, lane=2)) == first
    assert names(other.draw(20, seed=1, round=6, lane=2))[:6] == first
    keys = [(2, 6, 2), (1, 7, 2), (1, 6, 3)]
    assert all(names(one.draw(6, *key)) != first for key in keys)


def test_draws_are_uniform_over_the_stored_samples():
    counts = torch.bincount(torch.tensor(names(filled().draw(9000, 1, 6))))
    counts = counts[counts > 0]
    assert len(counts) == 9
    # Binomial with mean 1000 and deviation 29.8; five deviations.
    assert (counts - 1000).abs().max() < 150


def test_a_round_pushed_again_replaces_it_and_what_came_after():
    replay = filled()
    replay.push(gathered(4, count=2), 4)
    assert replay.rounds == [3, 4] and len(replay) == 5


def test_a_change_of_resolution_empties_the_ring():
    replay = filled()
    replay.push(gathered(6, size=3), 6)
    assert replay.rounds == [6]


def test_what_is_stored_has_no_graph_and_does_not_follow_its_source():
    samples = gathered(0)
    samples.latents.requires_grad_()
    replay = Replay(1)
    replay.push(samples, 0)
    with torch.no_grad():
        samples.latents.zero_()
    stored = replay.oldest()
    assert stored is not None and not stored.latents.requires_grad
    assert stored.latents[3, 0, 0, 0] == 3


@pytest.mark.parametrize("last", [-1, 0, 5])
def test_state_round_trip_keeps_rounds_and_draws(last):
    replay = filled(last=last)
    restored = Replay(3)
    restored.push(gathered(9), 9)
    restored.load_state(replay.state())
    assert restored.rounds == replay.rounds and len(restored) == len(replay)
    if last >= 0:
        one, other = replay.draw(8, 1, 6), restored.draw(8, 1, 6)
        assert all(torch.equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    shorter = Replay(2)
    shorter.load_state(replay.state())
    assert shorter.rounds == replay.rounds[-2:]


def test_a_torn_state_is_named():
    state = filled().state()
    del state["cameras"]
    with pytest.raises(CheckpointError, match="cameras"):
        Replay(3).load_state(state)


def test_lag_is_zero_on_the_same_renders_and_positive_where_the_score_was_fitted_to_the_old_ones(
    unet, make_score, make_batch
):
    # The old renders are all grey 1, the current ones all grey -1: fitting the old ones raises the loss on the others.
    score, old = make_score(unet, "sample"), make_batch(4)
    old = replace(old, samples=replace(old.samples, latents=torch.ones_like(old.noise)))
    current = replace(old.samples, latents=-old.samples.latents)
    assert on_policy_lag(score, old.samples, old.samples, 0, 7) == 0
    before = on_policy_lag(score, current, old.samples, 0, 7)
    for _ in range(20):
        (gradient,), _ = score.gradients(*old.arguments(), 4.0, [slice(0, 4)])
        score.step(gradient, 2e-2)
    after = on_policy_lag(score, current, old.samples, 0, 7)
    assert before is not None and after is not None and after > before + 0.5


def test_lag_does_not_depend_on_row_order_micro_batch_or_how_ranks_split_the_particles(unet, make_score, make_batch):
    score, batch = make_score(unet, shaken=True), make_batch(4)
    old = batch.samples
    current = replace(old, latents=old.latents * 0.5)
    whole = on_policy_lag(score, current, old, 3, 7)
    order = torch.tensor([2, 0, 3, 1])
    assert on_policy_lag(score, current[order], old, 3, 7) == pytest.approx(whole, rel=1e-4)
    assert on_policy_lag(make_score(unet, shaken=True, micro_batch=3), current, old, 3, 7) == pytest.approx(
        whole, rel=1e-4
    )
    split = [on_policy_lag(score, current[rows], old[rows], 3, 7) for rows in (slice(0, 3), slice(3, 4))]
    assert (3 * split[0] + split[1]) / 4 == pytest.approx(whole, rel=1e-4)
    assert on_policy_lag(score, current, old, 3, 8) != pytest.approx(whole, rel=1e-4)


def test_lag_compares_the_views_both_batches_have(unet, make_score, make_batch):
    score, batch = make_score(unet, shaken=True), make_batch(4)
    old = batch.samples
    current = replace(old, latents=old.latents * 0.5, weight=torch.tensor([1.0, 0.0, 1.0, 1.0]))
    current.latents[1] = float("nan")
    rest = torch.tensor([0, 2, 3])
    assert on_policy_lag(score, current, old, 3, 7) == pytest.approx(
        on_policy_lag(score, current[rest], old[rest], 3, 7), rel=1e-6
    )
    assert on_policy_lag(score, current[:1], old[2:], 3, 7) is None
    coarse = replace(old, latents=old.latents[..., :4, :4])
    assert on_policy_lag(score, coarse, old, 3, 7) is None


def test_two_views_of_a_particle_draw_their_own_noise(unet, make_score, make_batch):
    score, batch = make_score(unet, shaken=True), make_batch(2)
    twice = replace(batch.samples, ids=torch.zeros(2, dtype=torch.int64))
    seen: list[torch.Tensor] = []

    class Watching:
        process = score.process

        def loss(self, samples, timesteps, noise, keep_camera):
            seen.append(noise)
            assert not torch.is_grad_enabled() and bool(keep_camera.all())
            return score.loss(samples, timesteps, noise, keep_camera)

    on_policy_lag(Watching(), twice, twice, 0, 0)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0][0], seen[0][1])
