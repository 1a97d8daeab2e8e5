"""The forward process and the three ways a network can predict it, converted exactly.

Shape legend: B batch, C latent channels, H x W latent pixels. `abar_B` is alphas_cumprod[t], so alpha = sqrt(abar) and
sigma = sqrt(1 - abar). Pure functions, differentiable, any floating dtype; `abar_B` broadcasts over the other axes.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample"]


def add_noise(latents_BCHW: Tensor, noise_BCHW: Tensor, abar_B: Tensor) -> Tensor:
    """x_t = alpha x_0 + sigma eps."""
    alpha, sigma = _alpha_sigma(abar_B, latents_BCHW)
    return alpha * latents_BCHW + sigma * noise_BCHW


def target(latents_BCHW: Tensor, noise_BCHW: Tensor, abar_B: Tensor, prediction: PredictionType) -> Tensor:
    """What a network of this prediction type is trained to output: eps, v = alpha eps - sigma x_0, or x_0."""
    alpha, sigma = _alpha_sigma(abar_B, latents_BCHW)
    match prediction:
        case "epsilon":
            return noise_BCHW
        case "v_prediction":
            return alpha * noise_BCHW - sigma * latents_BCHW
        case "sample":
            return latents_BCHW
    raise ValueError(_unknown(prediction))


def to_eps(output_BCHW: Tensor, noisy_BCHW: Tensor, abar_B: Tensor, prediction: PredictionType) -> Tensor:
    """The noise a network's output stands for. With "sample" it is undefined at sigma = 0."""
    alpha, sigma = _alpha_sigma(abar_B, noisy_BCHW)
    match prediction:
        case "epsilon":
            return output_BCHW
        case "v_prediction":
            return alpha * output_BCHW + sigma * noisy_BCHW
        case "sample":
            return (noisy_BCHW - alpha * output_BCHW) / sigma
    raise ValueError(_unknown(prediction))


def to_x0(output_BCHW: Tensor, noisy_BCHW: Tensor, abar_B: Tensor, prediction: PredictionType) -> Tensor:
    """The clean latents a network's output stands for. With "epsilon" they are undefined at alpha = 0."""
    alpha, sigma = _alpha_sigma(abar_B, noisy_BCHW)
    match prediction:
        case "epsilon":
            return (noisy_BCHW - sigma * output_BCHW) / alpha
        case "v_prediction":
            return alpha * noisy_BCHW - sigma * output_BCHW
        case "sample":
            return output_BCHW
    raise ValueError(_unknown(prediction))


def _alpha_sigma(abar_B: Tensor, like_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    abar = abar_B.reshape(-1, *[1] * (like_BCHW.ndim - 1))
    return abar.sqrt(), (1 - abar).sqrt()


def _unknown(prediction: str) -> str:
    return f"prediction type is {prediction!r}; known are 'epsilon', 'v_prediction' and 'sample'"
