"""The forward process and the conversions between predictions."""

import pytest
import torch

from distvsd.vsd.process import add_noise, target, to_eps, to_x0

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def draw(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(5, 3, 2, 2, generator=generator, dtype=dtype)
    noise = torch.randn(5, 3, 2, 2, generator=generator, dtype=dtype)
    abar = torch.tensor([0.99, 0.64, 0.5, 0.1, 0.01], dtype=dtype)
    return latents, noise, abar


def test_noise_is_added_with_alpha_and_sigma():
    # abar = 0.64: alpha = 0.8, sigma = 0.6; 0.8 * 2 + 0.6 * (-1) = 1.0
    noisy = add_noise(torch.tensor([[[[2.0]]]]), torch.tensor([[[[-1.0]]]]), torch.tensor([0.64]))
    assert noisy.item() == pytest.approx(1.0, abs=1e-6)


def test_velocity_is_alpha_eps_minus_sigma_x0():
    # 0.8 * (-1) - 0.6 * 2 = -2.0
    v = target(torch.tensor([[[[2.0]]]]), torch.tensor([[[[-1.0]]]]), torch.tensor([0.64]), "v_prediction")
    assert v.item() == pytest.approx(-2.0, abs=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_network_gives_back_the_noise_and_the_latents(prediction):
    latents, noise, abar = draw()
    noisy = add_noise(latents, noise, abar)
    output = target(latents, noise, abar, prediction)
    torch.testing.assert_close(to_eps(output, noisy, abar, prediction), noise, rtol=0, atol=1e-12)
    torch.testing.assert_close(to_x0(output, noisy, abar, prediction), latents, rtol=0, atol=1e-12)


def test_velocity_is_defined_at_both_ends_of_the_schedule():
    latents, noise, _ = draw()
    for end in (0.0, 1.0):
        abar = torch.full((5,), end, dtype=torch.float64)
        noisy = add_noise(latents, noise, abar)
        output = target(latents, noise, abar, "v_prediction")
        torch.testing.assert_close(to_eps(output, noisy, abar, "v_prediction"), noise)
        torch.testing.assert_close(to_x0(output, noisy, abar, "v_prediction"), latents)


@pytest.mark.parametrize("function", [target, to_eps, to_x0])
def test_an_unknown_prediction_type_is_named(function):
    latents, noise, abar = draw()
    with pytest.raises(ValueError, match="'velocity'"):
        function(latents, noise, abar, "velocity")
