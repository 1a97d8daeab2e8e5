"""What a step of the score network's optimiser does."""

from __future__ import annotations

import torch

from distvsd.vsd.samples import slices

from .conftest import draw


def flat(score) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in score.trainable.values()])


def test_the_first_steps_are_adamw_with_linear_warm_up(unet, make_score):
    score = make_score(unet, shaken=True, warmup=4, weight_decay=0.1)
    before, gradient = flat(score), draw(9, sum(score.num_parameters))
    score.step(gradient, 1e-2)
    # First step: m-hat = g, v-hat = g^2; the decay is decoupled. Rate 1e-2 * 1/4.
    rate = 2.5e-3
    expected = before * (1 - rate * 0.1) - rate * gradient / (gradient.abs() + 1e-8)
    assert torch.allclose(flat(score), expected, atol=1e-7)
    score.step(gradient, 1e-2)
    # The same gradient again: bias correction gives m-hat = g, v-hat = g^2 once more. Rate 1e-2 * 2/4.
    rate = 5e-3
    assert torch.allclose(flat(score), expected * (1 - rate * 0.1) - rate * gradient.sign(), atol=1e-5)
    for _ in range(3):
        score.step(gradient, 1e-2)
    before = flat(score)
    score.step(gradient, 1e-2)
    # The warm-up of four steps is over: the full rate.
    assert torch.allclose(flat(score), before * (1 - 1e-2 * 0.1) - 1e-2 * gradient.sign(), atol=1e-5)
    assert score.local.num_steps == 6


def test_clipping_scales_a_long_gradient_down_and_leaves_a_short_one(unet, make_score):
    # Decay off. AdamW's first step does not depend on the gradient's magnitude; its second does.
    length = sum(make_score(unet).num_parameters)
    long, short = draw(9, length), 1e-3 * draw(8, length) / draw(8, length).norm()
    clipped, by_hand = (make_score(unet, weight_decay=0.0, max_grad_norm=limit) for limit in (1.0, 0.0))
    untouched = long.clone()
    for gradient in (long, short):
        clipped.step(gradient, 1e-2)
        by_hand.step(gradient / gradient.norm().clamp(min=1.0), 1e-2)
    assert torch.equal(long, untouched)
    assert torch.allclose(flat(clipped), flat(by_hand), atol=1e-6)


def test_training_lowers_the_loss_on_a_fixed_batch(unet, make_score, make_batch):
    score, batch = make_score(unet, "v_prediction"), make_batch(4)
    before = score.loss(*batch.arguments()).mean().item()
    for _ in range(25):
        (gradient,), _ = score.gradients(*batch.arguments(), 4.0, [slice(0, 4)])
        score.step(gradient, 2e-2)
    assert score.loss(*batch.arguments()).mean().item() < 0.9 * before


def test_micro_batches_cover_every_row_once():
    assert slices(5, 0) == [slice(0, 5)]
    assert slices(5, 2) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert slices(0, 0) == []


def test_micro_batches_never_cut_through_the_views_of_a_particle():
    assert slices(12, 5, 3) == [slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 12)]
    assert slices(12, 6, 3) == [slice(0, 6), slice(6, 12)]
    assert slices(6, 1, 3) == [slice(0, 3), slice(3, 6)]
    assert slices(6, 0, 3) == [slice(0, 6)]
