from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distvsd.errors import PriorError
from distvsd.networks.patch_codec import PatchCodec
from distvsd.prior import Pipeline, load_prior
from distvsd.vsd.rng import Purpose, normal, uniform


def pictures(count: int, side: int) -> Tensor:
    return uniform(0, Purpose.EVALUATE, list(range(count)), 0, (3, side, side))


def test_an_autoencoder_encodes_to_the_scaled_mean_of_its_posterior(shared_prior: Callable[..., Pipeline]) -> None:
    from diffusers import AutoencoderKL

    prior = shared_prior("sd15")
    vae = AutoencoderKL.from_pretrained(prior.folder.path / "vae")
    images = pictures(2, 64)
    with torch.no_grad():
        wanted = vae.encode(images * 2 - 1).latent_dist.mean * 0.18215
        back = (vae.decode(wanted / 0.18215).sample + 1) / 2
    latents = prior.encode(images)
    assert latents.shape[1:] == prior.latent_shape(64)
    torch.testing.assert_close(latents, wanted)
    torch.testing.assert_close(prior.decode(latents), back)
    assert torch.equal(latents, prior.encode(images))


def test_the_shift_of_an_autoencoder_is_taken_off_before_the_scale(own_pipeline: Callable[..., Path]) -> None:
    folder = own_pipeline("sd15")
    images = pictures(1, 64)
    unshifted = load_prior(str(folder), [""])
    plain = unshifted.encode(images)
    config = folder / "vae/config.json"
    config.write_text(config.read_text().replace('"shift_factor": null', '"shift_factor": 0.5'))
    prior = load_prior(str(folder), [""])
    torch.testing.assert_close(prior.encode(images), plain - 0.5 * 0.18215)
    # Decoding adds the shift back, so the image equals that of the unshifted codec from the unshifted latents.
    torch.testing.assert_close(prior.decode(plain - 0.5 * 0.18215), unshifted.decode(plain), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_gradient_of_encoding_is_the_slope_of_the_loss(shared_prior: Callable[..., Pipeline]) -> None:
    from diffusers import AutoencoderKL

    prior = shared_prior("sd21")
    vae = AutoencoderKL.from_pretrained(prior.folder.path / "vae").double()
    images = pictures(1, 64).requires_grad_()
    weight = normal(1, Purpose.EVALUATE, [0], 0, (4, 8, 8))
    direction = normal(2, Purpose.EVALUATE, [0], 0, (3, 64, 64))
    with torch.enable_grad():
        loss_here = (prior.encode(images) * weight).sum()
    (gradient,) = torch.autograd.grad(loss_here, images)

    def loss(step: float) -> float:
        moved = images.detach().double() + step * direction.double()
        return float((vae.encode(moved * 2 - 1).latent_dist.mean * 0.18215 * weight.double()).sum())

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-3, abs=1e-4)


def test_the_patch_codec_is_lossless_and_its_gradient_is_the_scaled_upstream_gradient(
    shared_prior: Callable[..., Pipeline],
) -> None:
    prior = shared_prior("shapes")
    images = pictures(2, 32).requires_grad_()
    latents = prior.encode(images)
    assert latents.shape[1:] == prior.latent_shape(32) == (48, 8, 8)
    torch.testing.assert_close(prior.decode(latents.detach()), images.detach())
    (gradient,) = torch.autograd.grad(latents.sum(), images)
    # d latent / d pixel = 2 * 1.6 for exactly one latent each.
    torch.testing.assert_close(gradient, torch.full_like(gradient, 3.2))


def test_the_detail_gain_amplifies_what_differs_from_the_mean_of_a_patch_and_nothing_else() -> None:
    """One 2 x 2 patch a channel, by hand: pixels 0, 0, 0, 1 are -1, -1, -1, 1 with mean -0.5; gain 3 about the mean."""
    image = torch.zeros(1, 3, 2, 2)
    image[0, 1, 1, 1] = 1.0
    latents = PatchCodec(2, 1.0, 3.0).encode(image)
    expected = torch.full((1, 12, 1, 1), -1.0)
    expected[0, 4:8, 0, 0] = torch.tensor([-2.0, -2.0, -2.0, 4.0])
    torch.testing.assert_close(latents, expected)


def test_the_patch_codec_with_a_detail_gain_is_lossless_in_float64() -> None:
    images = pictures(3, 16).double()
    codec = PatchCodec(4, 1.3, 4.0)
    torch.testing.assert_close(codec.decode(codec.encode(images)), images, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(codec.encode, images[:1, :, :4, :4].clone().requires_grad_())


@pytest.mark.parametrize("layout", ("sd15", "shapes"))
def test_no_images_give_no_latents(layout: str, shared_prior: Callable[..., Pipeline]) -> None:
    prior = shared_prior(layout)
    assert prior.encode(torch.zeros(0, 3, 64, 64)).shape == (0, *prior.latent_shape(64))


def test_a_resolution_that_does_not_fit_the_codec_is_refused_with_its_step(
    shared_prior: Callable[..., Pipeline],
) -> None:
    prior = shared_prior("sd15")
    with pytest.raises(PriorError, match=r"100 x 100 pixels.*multiple of 8"):
        prior.latent_shape(100)
