from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distvsd.prior import Pipeline, load_prior
from distvsd.prior.guidance import GUIDED, ClassifierFree

PREDICTIONS = ("epsilon", "v_prediction", "sample")
IDS, VIEWS = torch.tensor([1, 0, 1, 1]), torch.tensor([0, 10, 2, 8])
TIMESTEPS = torch.tensor([20, 400, 700, 979])
TEXTS = [
    "a blue sphere, front view",
    "a red cube, overhead view",
    "a blue sphere, side view",
    "a blue sphere, three-quarter back view from above",
]


def load(folder: Path, **options: int) -> Pipeline:
    return load_prior(str(folder), ["a red cube", "a blue sphere"], negative_prompt="grey", **options)  # type: ignore[arg-type]


def draw(channels: int) -> Tensor:
    return torch.linspace(-2, 2, 4 * channels * 64).sin().view(4, channels, 8, 8) * 1.5


def ask(prior: Pipeline, noisy: Tensor, scale: float, *parts: Any, t: Tensor = TIMESTEPS) -> Tensor:
    """The part that is named, by default the guided prediction."""
    wanted = frozenset(parts or ("guided",))
    condition = prior.condition(IDS[: len(noisy)], VIEWS[: len(noisy)])
    found = prior.ask(noisy, t[: len(noisy)], condition, wanted, ClassifierFree(scale))
    return found.of(next(iter(wanted)))


def batches(prior: Pipeline) -> list[int]:
    """A list that gets the batch size of every UNet call from now on."""
    sizes: list[int] = []
    prior.denoiser.module.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0])))
    return sizes


def written_out(folder: Path, noisy: Tensor, scale: float, prediction: str) -> Tensor:
    """Guided eps, one sample and one text at a time, from the folder's own models, in float64."""
    import diffusers
    from transformers import AutoTokenizer, CLIPTextModel

    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").double().eval()
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").double().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")

    def eps(x: Tensor, t: Tensor, text: str) -> Tensor:
        ids = tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
        output = unet(x[None], t, encoder_hidden_states=encoder(ids).last_hidden_state).sample[0]
        abar = scheduler.alphas_cumprod[t].double()
        if prediction == "v_prediction":
            return abar.sqrt() * output + (1 - abar).sqrt() * x
        if prediction == "sample":
            return (x - abar.sqrt() * output) / (1 - abar).sqrt()
        return output

    with torch.no_grad():
        rows = [
            eps(x, t, "grey") + scale * (eps(x, t, text) - eps(x, t, "grey"))
            for x, t, text in zip(noisy.double(), TIMESTEPS, TEXTS, strict=True)
        ]
    return torch.stack(rows)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("layout", ("sd15", "sd21", "shapes"))
def test_eps_equals_guidance_written_out_sample_by_sample(
    layout: str, prediction: str, shared_prior: Callable[..., Pipeline]
) -> None:
    prior = shared_prior(layout, prediction)
    noisy = draw(prior.folder.latent_channels)
    eps = ask(prior, noisy, 7.5)
    assert eps.dtype == torch.float32
    assert not eps.requires_grad
    # At t = 20 an x0-prediction is divided by a small sigma, hence a tolerance relative to the size of the result.
    wanted = written_out(prior.folder.path, noisy, 7.5, prediction)
    torch.testing.assert_close(eps.double(), wanted, rtol=2e-4, atol=2e-5 * float(wanted.abs().max()))


def test_guidance_runs_one_call_of_twice_the_batch_and_scale_one_runs_half_of_it(
    shared_pipeline: Callable[..., Path],
) -> None:
    prior = load(shared_pipeline("sd15"))
    sizes = batches(prior)
    noisy = draw(4)
    ask(prior, noisy, 7.5)
    conditional = ask(prior, noisy, 1.0)
    unconditional = ask(prior, noisy, 0.0)
    assert sizes == [8, 4, 4]
    # Larger scales combine these two predictions.
    together = ask(prior, noisy, 3.0)
    torch.testing.assert_close(together, unconditional + 3 * (conditional - unconditional), rtol=1e-4, atol=1e-5)


def test_a_micro_batch_bounds_the_samples_of_a_call_and_changes_nothing_else(
    shared_pipeline: Callable[..., Path], shared_prior: Callable[..., Pipeline]
) -> None:
    whole, parts = shared_prior("shapes"), load(shared_pipeline("shapes"), micro_batch=3)
    sizes = batches(parts)
    noisy = draw(48)
    eps = ask(parts, noisy, 5.0)
    assert sizes == [6, 2]
    torch.testing.assert_close(eps, ask(whole, noisy, 5.0), rtol=1e-5, atol=1e-5)


def test_no_samples_give_no_eps_and_no_call(shared_pipeline: Callable[..., Path]) -> None:
    prior = load(shared_pipeline("sd15"))
    sizes = batches(prior)
    assert ask(prior, torch.zeros(0, 4, 8, 8), 7.5).shape == (0, 4, 8, 8)
    assert sizes == []


def test_no_gradient_flows_through_the_prior(shared_prior: Callable[..., Pipeline]) -> None:
    prior = shared_prior("sd15")
    noisy = draw(4).requires_grad_()
    assert not ask(prior, noisy, 7.5).requires_grad


def test_at_pure_noise_the_eps_of_a_v_prediction_is_the_input(
    shared_prior: Callable[..., Pipeline],
) -> None:
    prior = shared_prior("shapes")
    noisy = draw(48)
    # alpha = 0 and sigma = 1, so eps = alpha v + sigma x = x.
    last = torch.full((4,), 999)
    torch.testing.assert_close(ask(prior, noisy, 7.5, t=last), noisy)


def test_each_part_is_what_guidance_combines_and_all_of_them_take_one_call(
    shared_pipeline: Callable[..., Path],
) -> None:
    prior = load(shared_pipeline("sd15"))
    noisy, parts = draw(4), frozenset({"conditional", "unconditional", "guided"})
    condition = prior.condition(IDS, VIEWS)
    sizes = batches(prior)
    found = prior.ask(noisy, TIMESTEPS, condition, parts, ClassifierFree(3.0))
    assert sizes == [8]
    mixed = found.of("unconditional") + 3 * (found.of("conditional") - found.of("unconditional"))
    torch.testing.assert_close(found.of("guided"), mixed, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ask(prior, noisy, 3.0, "conditional"), found.of("conditional"), rtol=1e-4, atol=1e-5)
    assert sizes == [8, 4]


def test_the_views_of_a_particle_are_asked_about_in_one_call(shared_pipeline: Callable[..., Path]) -> None:
    prior = load(shared_pipeline("sd15"), micro_batch=3)
    sizes = batches(prior)
    condition = prior.condition(IDS, VIEWS, views_per_particle=2)
    prior.ask(draw(4), TIMESTEPS, condition, frozenset({"conditional"}), ClassifierFree(1.0))
    assert sizes == [2, 2]


@pytest.mark.parametrize("kind", ["sd15", "shapes"])
def test_guidance_applies_within_its_range_and_elsewhere_a_sample_takes_half_of_the_work(
    shared_pipeline: Callable[..., Path], kind: str
) -> None:
    """Times 400 and 700 of 999 are between 0.3 and 0.75 of the range, 20 and 979 are not."""
    prior = load(shared_pipeline(kind))
    noisy, condition = draw(4 if kind == "sd15" else 48), prior.condition(IDS, VIEWS)
    everywhere, nowhere = ask(prior, noisy, 3.0), ask(prior, noisy, 3.0, "conditional")
    sizes = batches(prior)
    found = prior.ask(noisy, TIMESTEPS, condition, GUIDED, ClassifierFree(3.0, 0.3, 0.75)).of("guided")
    expected = torch.stack((nowhere[0], everywhere[1], everywhere[2], nowhere[3]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert sizes == [6]
    prior.ask(noisy, TIMESTEPS, condition, GUIDED, ClassifierFree(3.0, 0.8, 0.9))
    prior.ask(noisy, TIMESTEPS, condition, GUIDED, ClassifierFree(3.0, 20 / 999, 979 / 999))  # both ends are included
    assert sizes == [6, 4, 8]


def test_guidance_in_a_range_never_cuts_through_the_views_of_a_particle(shared_pipeline: Callable[..., Path]) -> None:
    prior = load(shared_pipeline("sd15"))
    noisy, sizes = draw(4), batches(prior)
    condition = prior.condition(IDS, VIEWS, views_per_particle=2)
    found = prior.ask(noisy, TIMESTEPS, condition, GUIDED, ClassifierFree(3.0, 0.9, 1.0)).of("guided")
    assert sizes == [6]
    expected = torch.cat((ask(prior, noisy, 3.0, "conditional")[:3], ask(prior, noisy, 3.0)[3:]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
