"""The score network's loss and gradients against independent computations, and what masking and dropping change."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from .conftest import text_of


def independent_loss(unet, trainable: dict[str, Tensor], batch, row: int, prediction_type: str) -> Tensor:
    """The loss of one sample in float64: LoRA merged into the weights, the camera added by a hook, x_t by hand."""
    base = copy.deepcopy(unet).double()
    merged = {}
    for name, low in trainable.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            merged[f"{module}.weight"] = (
                base.get_parameter(f"{module}.weight") + trainable[name.replace("lora_A", "lora_B")] @ low
            )
    camera = batch.samples.cameras[row].double() * float(batch.keep_camera[row])
    hidden = trainable["camera.first.weight"] @ camera + trainable["camera.first.bias"]
    embedding = trainable["camera.last.weight"] @ (hidden * hidden.sigmoid()) + trainable["camera.last.bias"]
    base.time_embedding.register_forward_hook(lambda module, inputs, output: output + embedding)
    t = batch.times[row]
    abar = torch.linspace(0.99, 0.01, 100)[t].double()
    x0, noise = batch.samples.latents[row].double(), batch.noise[row].double()
    noisy = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
    text = text_of(batch.samples.ids[row : row + 1]).text.double()
    output = functional_call(base, merged, (noisy[None], t, text)).sample[0]
    wanted = {"epsilon": noise, "v_prediction": abar.sqrt() * noise - (1 - abar).sqrt() * x0, "sample": x0}
    return ((output - wanted[prediction_type]) ** 2).mean()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_losses_and_gradients_equal_an_independent_float64_computation(unet, make_score, make_batch, prediction_type):
    score, batch = make_score(unet, prediction_type, shaken=True), make_batch(3)
    batch = replace(
        batch,
        keep_camera=torch.tensor([True, False, True]),
        samples=replace(batch.samples, weight=torch.tensor([1.0, 1.0, 0.5])),
    )
    leaves = {name: p.detach().double().requires_grad_() for name, p in score.trainable.items()}
    losses = torch.stack([independent_loss(unet, leaves, batch, row, prediction_type) for row in range(3)])
    objective = (losses * batch.samples.weight).sum() / 2.5
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(objective, list(leaves.values()))])
    (gradient,), measured = score.gradients(*batch.arguments(), 2.5, [slice(0, 3)])
    assert torch.allclose(measured.double(), losses.detach(), rtol=1e-5)
    assert gradient.dtype == torch.float32
    assert (gradient.double() - expected).norm() / expected.norm() < 3e-6


def test_the_loss_is_differentiable_in_the_score_network_and_not_in_the_samples(unet, make_score, make_batch):
    score, batch = make_score(unet), make_batch(2)
    batch.samples.latents.requires_grad_()
    score.loss(*batch.arguments()).sum().backward()
    assert batch.samples.latents.grad is None
    assert all(p.grad is not None for p in score.trainable.values())


def test_micro_batches_sum_to_the_whole_batch(unet, make_score, make_batch):
    score, batch = make_score(unet, shaken=True), make_batch(5)
    (whole,), losses = score.gradients(*batch.arguments(), 5.0, [slice(0, 5)])
    pending, part_losses = score.gradients(*batch.arguments(), 5.0, [slice(0, 2), slice(2, 4), slice(4, 5)])
    parts = [next(pending)]
    assert part_losses[:2].all() and not part_losses[2:].any()  # each micro-batch is computed only when it is asked for
    parts += pending
    assert len(parts) == 3
    assert (sum(parts) - whole).norm() / whole.norm() < 1e-5
    assert torch.allclose(losses, part_losses, rtol=1e-4)
    assert torch.allclose(losses, score.loss(*batch.arguments()).detach(), rtol=1e-5)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_a_masked_sample_changes_no_bit_whatever_it_holds(unet, make_score, make_batch, poison):
    score, batch = make_score(unet, shaken=True), make_batch(4)
    samples = replace(batch.samples, weight=torch.tensor([1.0, 0.0, 1.0, 1.0]))
    poisoned = replace(samples, latents=samples.latents.clone(), cameras=samples.cameras.clone())
    poisoned.latents[1], poisoned.cameras[1] = poison, poison
    slices = [slice(0, 2), slice(2, 4)]
    clean, clean_losses = score.gradients(samples, *batch.arguments()[1:], 3.0, slices)
    dirty, dirty_losses = score.gradients(poisoned, *batch.arguments()[1:], 3.0, slices)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert torch.equal(clean_losses, dirty_losses) and dirty_losses[1] == 0
    assert torch.isfinite(score.loss(poisoned, *batch.arguments()[1:])).all()


def test_a_masked_sample_is_as_good_as_absent(unet, make_score, make_batch):
    score, batch = make_score(unet, shaken=True), make_batch(3)
    masked = replace(batch.samples, weight=torch.tensor([1.0, 0.0, 1.0]), latents=batch.samples.latents.clone())
    masked.latents[1] = float("nan")
    ones = [slice(0, 1), slice(1, 2), slice(2, 3)]
    with_it, _ = score.gradients(masked, *batch.arguments()[1:], 2.0, ones)
    present = torch.tensor([0, 2])
    rest = [field[present] for field in batch.arguments()[1:]]
    without, _ = score.gradients(batch.samples[present], *rest, 2.0, ones[:2])
    with_it = list(with_it)
    assert torch.equal(sum(with_it), sum(without))
    assert not with_it[1].any()


def test_no_samples_give_a_zero_gradient_and_no_losses(unet, make_score, make_batch):
    score, batch = make_score(unet), make_batch(2)
    (gradient,), losses = score.gradients(*[field[:0] for field in batch.arguments()], 2.0, [slice(0, 0)])
    assert gradient.shape == (sum(score.num_parameters),) and not gradient.any()
    assert len(losses) == 0 and len(score.loss(*[field[:0] for field in batch.arguments()])) == 0


def test_a_dropped_camera_does_not_reach_the_loss_and_a_kept_one_does(unet, make_score, make_batch):
    score, batch = make_score(unet, shaken=True), make_batch(4)
    keep = torch.tensor([True, False, True, False])
    moved = replace(batch.samples, cameras=batch.samples.cameras + 1)
    before = score.loss(batch.samples, batch.times, batch.noise, keep)
    after = score.loss(moved, batch.times, batch.noise, keep)
    assert torch.equal(before != after, keep)


def test_eps_without_a_camera_is_eps_with_the_zero_camera_and_differs_from_one_with_a_camera(
    unet, make_score, make_batch
):
    score, batch = make_score(unet, shaken=True), make_batch(2)
    arguments = (batch.noise, batch.times, batch.samples.ids)
    nowhere = score.eps(*arguments, None)
    assert torch.equal(nowhere, score.eps(*arguments, torch.zeros(2, 16)))
    assert (nowhere - score.eps(*arguments, batch.samples.cameras)).abs().max() > 1e-3


def test_float16_gradients_survive_a_large_denominator(make_unet, make_score, make_batch):
    # 1 / (256 elements * 1e5 samples) is below the smallest float16 number that is not zero.
    batch = make_batch(2)
    (exact,), _ = make_score(make_unet(), shaken=True).gradients(*batch.arguments(), 1e5, [slice(0, 2)])
    (half,), _ = make_score(make_unet().half(), shaken=True).gradients(*batch.arguments(), 1e5, [slice(0, 2)])
    assert (half - exact).norm() / exact.norm() < 0.05


def test_the_optimiser_is_adamw_with_the_decay_rates_and_epsilon_that_were_asked_for(unet, make_score, make_batch):
    """Against AdamW's formulas (arXiv 1711.05101, algorithm 2) in float64."""
    beta1, beta2, eps, decay, rate = 0.5, 0.75, 1e-3, 0.1, 1e-2
    score = make_score(unet, betas=(beta1, beta2), eps=eps, weight_decay=decay, shaken=True)
    expected = torch.cat([p.detach().double().flatten() for p in score.trainable.values()])
    first, second = torch.zeros_like(expected), torch.zeros_like(expected)
    for step in (1, 2, 3):
        gradient = torch.sin(torch.arange(len(expected), dtype=torch.float32) * step)
        first = beta1 * first + (1 - beta1) * gradient.double()
        second = beta2 * second + (1 - beta2) * gradient.double() ** 2
        moved = (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + eps)
        expected = expected * (1 - rate * decay) - rate * moved
        score.step(gradient, rate)
    found = torch.cat([p.detach().double().flatten() for p in score.trainable.values()])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
