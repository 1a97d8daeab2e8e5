"""Image particles: g(theta, c) = theta."""

import dataclasses
from pathlib import Path

import pytest
import torch

from distvsd.config import ImageConfig, load_config
from distvsd.particles import ImageParticle, Keys
from distvsd.prior import load_prior
from distvsd.run.parts import make_ensemble
from distvsd.testing.pipelines import tiny_pipeline
from tests.unit.particles.shards import FIXED, image

SMOKE = Path(__file__).parents[3] / "configs" / "smoke.yaml"

IDS = torch.tensor([0, 7])
CAMERAS = FIXED.sample(0, IDS, 0, 3, None)


def test_every_view_of_an_image_is_the_image():
    particle = image((3, 8, 8))
    parameters = particle.init(0, IDS)
    rendered = particle.render(parameters, CAMERAS, 8, Keys(0, IDS, 0))
    assert rendered.images.shape == (2, 3, 3, 8, 8)
    assert all(torch.equal(rendered.images[:, view], parameters["image"]) for view in range(3))
    assert rendered.opacity.min() == 1


def test_pixels_begin_grey_and_latents_around_zero_each_from_its_own_stream():
    pixels = image((3, 32, 32)).init(0, IDS)["image"]
    latents = image((4, 32, 32), init_scale=1.0).init(0, IDS)["image"]
    # 3,072 and 4,096 numbers a particle: five standard errors.
    assert abs(pixels[0].mean() - 0.5) < 0.01 and abs(pixels[0].std() - 0.1) < 0.01
    assert abs(latents[1].mean()) < 0.08 and abs(latents[1].std() - 1) < 0.06
    assert not torch.equal(pixels[0], pixels[1])


def test_particles_that_begin_in_colours_have_one_each_within_the_given_range():
    coloured, grey = (image((3, 8, 8), init_color=color).init(0, IDS)["image"] for color in (0.4, 0.0))
    colours = coloured - grey
    torch.testing.assert_close(colours, colours[:, :, :1, :1].expand_as(colours))
    assert colours.abs().max() <= 0.4 + 1e-6 and colours.abs().max() > 0.1
    assert len({tuple(colour.tolist()) for colour in colours[:, :, 0, 0]}) == len(IDS)


def test_latents_that_begin_in_colours_are_the_encoded_plain_pictures_under_their_noise():
    def encode(colors: torch.Tensor) -> torch.Tensor:  # two latent channels of 4 x 4
        return torch.cat((colors[:, :1], 10 * colors[:, 2:]), dim=1).expand(-1, -1, 4, 4)

    coloured = image((2, 4, 4), init_color=0.3)
    noise = image((2, 4, 4)).init(0, IDS)["image"]
    latents = dataclasses.replace(coloured, encode=encode).init(0, IDS)["image"]
    pixels = image(init_scale=0.0, init_color=0.3).init(0, IDS)["image"]
    torch.testing.assert_close(latents - noise, encode(pixels[:, :, :1, :1]))
    assert len({round(float(color), 4) for color in pixels[:, :, 0, 0].flatten()}) == 6  # all different
    with pytest.raises(ValueError, match="need `encode`"):
        coloured.init(0, IDS)


def test_a_run_in_latents_begins_with_the_priors_codes_of_colours_whoever_else_is_on_the_rank(tmp_path):
    prior = load_prior(str(tiny_pipeline(tmp_path / "prior", "sd15")), ["a red cube"])
    settings = ["particles.kind=image", "particles.image.space=latent", "particles.count=3", "render.resolution=64"]
    settings += ["particles.image.init_scale=0", "particles.image.init_color=0.3", f"prior.path={tmp_path / 'prior'}"]
    config = load_config(SMOKE, settings)
    together, alone = make_ensemble(config, prior, [0, 1, 2], "cpu"), make_ensemble(config, prior, [2], "cpu")
    latents = together.parameters_of(2)["image"]
    assert torch.equal(latents, alone.parameters_of(2)["image"])
    assert not torch.equal(latents, together.parameters_of(1)["image"])
    color = image((3, 1, 1), init_scale=0.0, init_color=0.3).init(config.run.seed, torch.tensor([2]))
    torch.testing.assert_close(latents[None], prior.encode(color["image"].expand(1, 3, 64, 64)))


def test_an_image_of_another_size_is_resized_as_torch_does_it():
    """But with a matrix for each axis, because torch's own gradient has no fixed order of additions on CUDA."""
    particle = ImageParticle(config=ImageConfig(), shape=(3, 16, 16), learning_rate=lambda step: 0.1)
    parameters = particle.init(0, torch.arange(2))
    shown = particle.view(parameters, CAMERAS, 8, 0.0).images[:, 0]
    wanted = torch.nn.functional.interpolate(parameters["image"], (8, 8), mode="bilinear", antialias=True)
    torch.testing.assert_close(shown, wanted)
