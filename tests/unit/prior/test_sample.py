from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distvsd.errors import PriorError
from distvsd.prior import Pipeline, load_prior
from distvsd.vsd.rng import Purpose, normal


@pytest.mark.parametrize("layout", ("sd15", "sd21"))
def test_samples_are_those_of_stable_diffusion_pipeline_from_the_same_noise(
    layout: str, shared_prior: Callable[..., Pipeline]
) -> None:
    from diffusers import StableDiffusionPipeline

    prior = shared_prior(layout)
    reference = StableDiffusionPipeline.from_pretrained(prior.folder.path, safety_checker=None, local_files_only=True)
    reference.set_progress_bar_config(disable=True)
    noise = normal(7, Purpose.SAMPLE, [0, 1], 0, (4, 8, 8))
    wanted = reference(
        ["a red cube", "a blue sphere"],
        negative_prompt=["grey", "grey"],
        num_inference_steps=6,
        guidance_scale=3.0,
        latents=noise,
        output_type="pt",
    ).images
    images = prior.sample([0, 1], 2, guidance_scale=3.0, steps=6, seed=7)
    assert images.shape == (2, 3, 64, 64)
    torch.testing.assert_close(images, wanted, rtol=1e-3, atol=1e-4)


def test_a_schedule_that_ends_in_pure_noise_is_sampled_from_its_very_end(shared_prior: Callable[..., Pipeline]) -> None:
    prior = shared_prior("shapes")
    text = prior.texts.bare(torch.tensor([0])).text
    x = normal(3, Purpose.SAMPLE, [0], 0, (48, 8, 8))
    abar = [*prior.process.alphas_cumprod.tolist(), 1.0]
    # DDIM by hand: x0 = alpha x - sigma v, eps = sigma x + alpha v; five trailing timesteps; after the last
    # the image is clean (index -1).
    with torch.no_grad():
        for t, before in ((999, 799), (799, 599), (599, 399), (399, 199), (199, -1)):
            v = prior.denoiser.module(x, torch.tensor([t]), encoder_hidden_states=text).sample
            alpha, sigma = abar[t] ** 0.5, (1 - abar[t]) ** 0.5
            clean, eps = alpha * x - sigma * v, sigma * x + alpha * v
            x = abar[before] ** 0.5 * clean + (1 - abar[before]) ** 0.5 * eps
    images = prior.sample([0], 1, guidance_scale=1.0, steps=5, seed=3)
    torch.testing.assert_close(images, prior.decode(x).clamp(0, 1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scheduler", ("DDIMScheduler", "DDPMScheduler", "EulerAncestralDiscreteScheduler"))
def test_an_image_depends_on_its_seed_and_index_and_not_on_the_batches(
    scheduler: str, own_pipeline: Callable[..., Path]
) -> None:
    folder = own_pipeline("sd21")
    config = folder / "scheduler/scheduler_config.json"
    config.write_text(config.read_text().replace("DDIMScheduler", scheduler))
    prior = load_prior(str(folder), ["a red cube", "a blue sphere"], negative_prompt="grey")
    images = prior.sample([0, 1], 5, guidance_scale=2.0, steps=4, seed=1)
    again = prior.sample([0, 1], 5, guidance_scale=2.0, steps=4, seed=1, batch_size=2)
    torch.testing.assert_close(images, again, rtol=1e-3, atol=1e-4)
    fewer = prior.sample([0, 1], 3, guidance_scale=2.0, steps=4, seed=1)
    torch.testing.assert_close(images[:3], fewer, rtol=1e-3, atol=1e-4)
    other = prior.sample([0, 1], 5, guidance_scale=2.0, steps=4, seed=2)
    assert (images - other).abs().mean() > 0.01
    assert (images[0] - images[2]).abs().mean() > 0.01
    assert images.min() >= 0
    assert images.max() <= 1


def test_sampling_twice_gives_the_same_bits_and_leaves_the_global_stream_alone(
    shared_prior: Callable[..., Pipeline],
) -> None:
    prior = shared_prior("sd15")
    state = torch.random.get_rng_state()
    first = prior.sample([0], 2, 3.0, 4, 0)
    assert torch.equal(first, prior.sample([0], 2, 3.0, 4, 0))
    assert torch.equal(state, torch.random.get_rng_state())


def test_prompts_can_be_named_by_their_words_or_by_the_ids_of_their_particles(
    shared_prior: Callable[..., Pipeline],
) -> None:
    prior = shared_prior("shapes")
    by_id = prior.sample(torch.tensor([1, 0]), 3, 3.0, 3, 0)
    assert torch.equal(by_id, prior.sample(["a blue sphere", "a red cube"], 3, 3.0, 3, 0))
    assert not torch.allclose(by_id, prior.sample([0, 1], 3, 3.0, 3, 0))
    viewed = prior.sample([1, 0], 3, 3.0, 3, 0, views=torch.tensor([0, 1, 2]))
    assert not torch.allclose(by_id, viewed)


def test_the_resolution_can_be_chosen_and_no_images_are_legal(shared_prior: Callable[..., Pipeline]) -> None:
    prior = shared_prior("shapes")
    assert prior.sample([0], 1, 1.0, 2, 0, resolution=16).shape == (1, 3, 16, 16)
    assert prior.sample([0], 0, 1.0, 2, 0).shape == (0, 3, 32, 32)


def test_impossible_numbers_of_steps_are_refused(shared_prior: Callable[..., Pipeline]) -> None:
    prior = shared_prior("shapes")
    for steps in (0, 1001):
        with pytest.raises(PriorError, match=f"{steps} sampling steps; give between 1 and"):
            prior.sample([0], 1, 1.0, steps, 0)


def test_samples_that_are_not_finite_are_an_error_and_not_an_image(shared_prior: Callable[..., Pipeline]) -> None:
    # Pure noise says nothing about the clean image, so an epsilon-prediction divides by zero there.
    prior = shared_prior("shapes", "epsilon")
    with pytest.raises(PriorError, match="not finite"):
        prior.sample([0], 1, 1.0, 3, 0)
