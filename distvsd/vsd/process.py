"""The forward process that a denoiser was trained on: diffusion, or rectified flow.

In both, x_t = alpha(t) x_0 + sigma(t) eps. They differ in what a time is, in alpha and sigma, and in what the network
predicts. Shape legend: N rows, then any axes. Pure functions of tensors, differentiable, any floating dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample"]


class Process(Protocol):
    """Times `[N]` are int64 indices of a table, or float32 numbers; only the process and its network depend on it."""

    def times(self, uniform: Tensor, low: float, high: float) -> Tensor:
        """Times `[N]` from uniform numbers `[N]` in [0, 1). low, high: shares of the whole range, in [0, 1]."""
        ...

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of x_0 and of eps, each `[N]` float32."""
        ...

    def agrees_with(self, other: Process) -> bool:
        """Whether a time means the same alpha and sigma in both, whatever the networks predict."""
        ...

    def weight(self, t: Tensor) -> Tensor:
        """w(t) of Eq. 9 (arXiv 2305.16213): sigma^2 / (alpha^2 + sigma^2), `[N]`."""
        ...

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network is trained to output for x_t made of `clean` and `noise`, `[N, ...]`."""
        ...

    def to_eps(self, output: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """The noise that corresponds to an output of the network, `[N, ...]`. Affine in `output`."""
        ...

    def to_x0(self, output: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """The clean sample that corresponds to an output of the network, `[N, ...]`. Affine in `output`."""
        ...


def add_noise(process: Process, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = alpha x_0 + sigma eps, `[N, ...]`."""
    alpha, sigma = _factors(process, t, clean)
    return alpha * clean + sigma * noise


@dataclass(frozen=True)
class Diffusion:
    """A variance-preserving process with a table of T steps; times are int64 indices in [0, T).

    alphas_cumprod: `[T]`; alpha = sqrt(alphas_cumprod[t]), sigma = sqrt(1 - alphas_cumprod[t]). prediction: what the
    network outputs: eps, v = alpha eps - sigma x_0 (arXiv 2202.00512), or x_0.
    """

    alphas_cumprod: Tensor
    prediction: PredictionType

    def __post_init__(self) -> None:
        if self.prediction not in get_args(PredictionType):
            raise ValueError(f"prediction type is {self.prediction!r}; known are {', '.join(get_args(PredictionType))}")

    def times(self, uniform: Tensor, low: float, high: float) -> Tensor:
        """See `Process`; both ends are included."""
        last = len(self.alphas_cumprod) - 1
        first, stop = round(low * last), round(high * last)
        return (first + uniform * (stop - first + 1)).long().clamp(max=stop)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        abar = self.alphas_cumprod[t]
        return abar.sqrt(), (1 - abar).sqrt()

    def agrees_with(self, other: Process) -> bool:
        if not isinstance(other, Diffusion) or self.alphas_cumprod.shape != other.alphas_cumprod.shape:
            return False
        return torch.allclose(self.alphas_cumprod, other.alphas_cumprod, atol=1e-4)

    def weight(self, t: Tensor) -> Tensor:
        return 1 - self.alphas_cumprod[t]

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        match self.prediction:
            case "epsilon":
                return noise
            case "v_prediction":
                alpha, sigma = _factors(self, t, clean)
                return alpha * noise - sigma * clean
            case "sample":
                return clean

    def to_eps(self, output: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """See `Process`. For "sample" it is undefined at sigma = 0."""
        alpha, sigma = _factors(self, t, noisy)
        match self.prediction:
            case "epsilon":
                return output
            case "v_prediction":
                return alpha * output + sigma * noisy
            case "sample":
                return (noisy - alpha * output) / sigma

    def to_x0(self, output: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """See `Process`. For "epsilon" it is undefined at alpha = 0."""
        alpha, sigma = _factors(self, t, noisy)
        match self.prediction:
            case "epsilon":
                return (noisy - sigma * output) / alpha
            case "v_prediction":
                return alpha * noisy - sigma * output
            case "sample":
                return output


@dataclass(frozen=True)
class Flow:
    """Rectified flow (arXiv 2209.03003): x_s = (1 - s) x_0 + s eps, and the network outputs v = eps - x_0.

    Times are float32 numbers s in [0, 1]. shift: moves times towards noise, s -> shift s / (1 + (shift - 1) s), as
    Stable Diffusion 3 does for large images (arXiv 2403.03206, Eq. 23).
    """

    shift: float = 1.0

    def times(self, uniform: Tensor, low: float, high: float) -> Tensor:
        share = low + (high - low) * uniform
        return self.shift * share / (1 + (self.shift - 1) * share)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def agrees_with(self, other: Process) -> bool:
        return isinstance(other, Flow)

    def weight(self, t: Tensor) -> Tensor:
        return t.square() / ((1 - t).square() + t.square())

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - clean

    def to_eps(self, output: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        return noisy + _column(1 - t, noisy) * output

    def to_x0(self, output: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        return noisy - _column(t, noisy) * output


def _factors(process: Process, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    alpha, sigma = process.alpha_sigma(t)
    return _column(alpha, like), _column(sigma, like)


def _column(values: Tensor, like: Tensor) -> Tensor:
    """`[N]` as `[N, 1, ...]`, to be multiplied with `like` `[N, ...]`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
