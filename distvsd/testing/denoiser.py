"""What a prior's or a score's network must fulfil: run `check_denoiser` on yours in your own tests."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from distvsd.config import ScoreConfig
from distvsd.networks.base import Adaptable, Condition
from distvsd.score.camera import CAMERA_FEATURES
from distvsd.score.lora import LoraScore
from distvsd.testing.rules import ROUNDING, require, subject
from distvsd.vsd.process import Process, add_noise
from distvsd.vsd.rng import Purpose, normal
from distvsd.vsd.samples import Samples

LEVELS = (0.05, 0.35, 0.65, 0.95)  # shares of the range of times


def check_process(process: Process, device: torch.device | str = "cpu") -> None:
    """Raises AssertionError for the first rule of a forward process that is broken; see `check_denoiser`."""
    times = process.times(torch.tensor(LEVELS, device=device), 0.0, 1.0)
    alpha, sigma = (factor.double() for factor in process.alpha_sigma(times))
    require(times.shape == alpha.shape == sigma.shape, "times, alpha and sigma must have one number a row")
    ratio = sigma / (alpha + sigma)
    require(bool((ratio.diff() > 0).all()), f"the noise does not grow with the time: {ratio.tolist()}")
    middle = process.times(torch.tensor(LEVELS, device=device), 0.4, 0.6)
    inside = process.alpha_sigma(middle)[1] / sum(process.alpha_sigma(middle))
    require(
        bool(ratio[0] <= inside.min()) and bool(inside.max() <= ratio[-1]),
        "times drawn between the shares 0.4 and 0.6 leave the range of those drawn between 0 and 1",
    )
    wanted = sigma.square() / (alpha.square() + sigma.square())
    require(
        torch.allclose(process.weight(times).double(), wanted, rtol=1e-4, atol=1e-6),
        "w(t) is not sigma^2 / (alpha^2 + sigma^2), so objectives weigh noise levels unlike under any other process",
    )
    shape = (len(LEVELS), 3, 4, 4)
    clean, noise, output = (_random(lane, shape, device).double() for lane in (1, 2, 3))
    noisy = add_noise(process, clean, noise, times)
    made = alpha.reshape(-1, 1, 1, 1) * clean + sigma.reshape(-1, 1, 1, 1) * noise
    _require_close(noisy, made, "add_noise is not alpha x_0 + sigma eps")
    target = process.target(clean, noise, times)
    _require_close(process.to_eps(target, noisy, times), noise, "to_eps of a perfect prediction is not the noise")
    _require_close(process.to_x0(target, noisy, times), clean, "to_x0 of a perfect prediction is not the clean sample")
    eps, x0 = process.to_eps(output, noisy, times), process.to_x0(output, noisy, times)
    _require_close(
        add_noise(process, x0, eps, times), noisy, "the eps and x_0 of one output do not make the x_t that it is for"
    )


def check_denoiser(denoiser: Adaptable, condition: Condition, edge: int = 8) -> None:
    """Raises AssertionError with one paragraph, what is wrong and why it matters, for the first rule that is broken.

    condition: of at least two particles with different texts, `views_per_particle` rows each, without cameras. edge: of
    the latents that are tried, in latent pixels. Needs no ranks and does not communicate.
    """
    views = condition.views_per_particle
    require(
        len(condition) >= 2 * views and len(condition) % views == 0,
        f"the condition has {len(condition)} rows; give at least two particles of {views} views",
    )
    device = condition.text.device
    noisy = _random(4, (len(condition), denoiser.space.channels, edge, edge), device)
    times = denoiser.process.times(torch.linspace(0.2, 0.8, len(condition), device=device), 0.0, 1.0)
    with subject(f"this {type(denoiser).__name__} cannot be used here"):
        check_process(denoiser.process, device)
        _check_predictions(denoiser, noisy, times, condition)
        _check_adapter(denoiser, noisy, times, condition)


@torch.no_grad()
def _check_predictions(denoiser: Adaptable, noisy: Tensor, times: Tensor, condition: Condition) -> None:
    views = condition.views_per_particle
    kept = noisy.clone()
    output = denoiser.predict(noisy, times, condition)
    require(
        output.shape == noisy.shape and output.dtype == torch.float32,
        f"predict gives {list(output.shape)} {output.dtype}; it must give {list(noisy.shape)} torch.float32",
    )
    require(bool(output.isfinite().all()), "predict gives values that are not finite for noise of unit variance")
    require(torch.equal(noisy, kept), "predict changes its input in place; the objective reads it afterwards")
    require(
        not any(parameter.requires_grad for parameter in denoiser.module.parameters()),
        "a parameter of the module wants a gradient; a frozen network that is trained by accident drifts",
    )
    rows = slice(views, 2 * views)
    alone = denoiser.predict(noisy[rows], times[rows], condition[rows])
    _require_near(alone, output[rows], "a particle's prediction depends on which other particles are in the call")
    last = torch.arange(len(noisy), device=noisy.device).reshape(-1, views).flip(0).flatten()
    swapped = denoiser.predict(noisy[last], times[last], condition[last])
    _require_near(swapped, output[last], "particles in another order give other predictions than in the first")
    texts = denoiser.predict(noisy, times, condition.with_text_of(condition[last]))
    require(
        not torch.allclose(texts, output, rtol=ROUNDING, atol=0),
        "other texts give the same prediction; guidance would do nothing",
    )
    later = denoiser.process.times(torch.full_like(noisy[:, 0, 0, 0], 0.99), 0.0, 1.0)
    require(
        not torch.allclose(denoiser.predict(noisy, later, condition), output, rtol=ROUNDING, atol=0),
        "another time gives the same prediction; the network is not told how much noise there is",
    )


def _check_adapter(denoiser: Adaptable, noisy: Tensor, times: Tensor, condition: Condition) -> None:
    """The score network made from it must start as the base, depend on the camera, and leave the base unchanged."""
    views, device = condition.views_per_particle, noisy.device
    with torch.no_grad():
        before = denoiser.predict(noisy, times, condition)
    score = LoraScore(
        base=denoiser,
        text_of=lambda ids: condition[ids],
        config=ScoreConfig(rank=2, warmup=0, learning_rate=1e-2),
        seed=0,
        device=device,
        num_views=views,
    )
    ids = torch.arange(len(noisy), device=device)
    cameras = _random(5, (len(noisy), CAMERA_FEATURES), device)
    eps = denoiser.process.to_eps(before, noisy, times)
    untrained = score.eps(noisy, times, ids, cameras)
    _require_near(untrained, eps, "an untrained adapter changes the network's predictions")
    weight = torch.ones(len(ids), device=device)
    samples = Samples(_random(6, tuple(noisy.shape), device), cameras, ids, torch.zeros_like(ids), weight)
    keep = torch.ones_like(ids, dtype=torch.bool)
    loss = score.loss(samples, times, _random(7, tuple(noisy.shape), device), keep).sum()
    found = torch.autograd.grad(loss, list(score.trainable.values()), allow_unused=True)
    unused = [name for name, gradient in zip(score.trainable, found, strict=True) if gradient is None]
    require(
        not unused,
        f"the loss does not depend on {', '.join(unused[:3])}; the camera or an adapted layer has no effect",
    )
    # The last layers of adapter and camera begin at zero, so the layers before them get a gradient from step 2 on.
    for lane in (7, 8):
        batch = samples, times, _random(lane, tuple(noisy.shape), device), keep
        gradients, _ = score.gradients(*batch, float(len(ids)), [slice(0, len(ids))])
        score.step(next(iter(gradients)), 1e-2)
    told, untold = score.eps(noisy, times, ids, cameras), score.eps(noisy, times, ids, None)
    require(
        not torch.allclose(told, untold, rtol=ROUNDING, atol=0),
        "after two steps the prediction does not depend on the camera; add_camera has no effect",
    )
    with torch.no_grad():
        _require_near(
            denoiser.predict(noisy, times, condition), before, "training the adapter changed the frozen network"
        )
        switched_off = score.without_adapter().predict(noisy, times, replace(condition, cameras=cameras))
    _require_near(switched_off, before, "with its adapter switched off the score network is not the frozen one")


def _random(lane: int, shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    return normal(0, Purpose.SAMPLE, [0], 0, shape, lane)[0].to(device)


def _require_close(found: Tensor, wanted: Tensor, otherwise: str) -> None:
    """In float64, from alpha and sigma in float32."""
    error = float((found - wanted).abs().max() / wanted.abs().max())
    require(error < 1e-6, f"{otherwise}: they differ by {error:.2g}, relative")


def _require_near(found: Tensor, wanted: Tensor, otherwise: str) -> None:
    error = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6))
    require(error < ROUNDING, f"{otherwise}: they differ by {error:.2g}, relative")
