"""The interface of an objective: the predictions that it needs, and the gradient computed from them.

Shape legend: N rows (views of particles), C latent channels, H x W latent pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from distvsd.vsd.process import Process
from distvsd.vsd.samples import Samples

PriorPart = Literal["conditional", "unconditional", "guided"]
ScorePart = Literal["score", "score_without_camera"]
Part = PriorPart | ScorePart


@dataclass(frozen=True)
class Predictions:
    """Noise predictions for x_t, each `[N, C, H, W]` float32 without a graph; None where it was not requested.

    conditional, unconditional: the prior with the prompt and with the negative prompt. guided: both combined by the
    run's guidance. score: the score network with the camera. score_without_camera: the same network without it.
    """

    conditional: Tensor | None = None
    unconditional: Tensor | None = None
    guided: Tensor | None = None
    score: Tensor | None = None
    score_without_camera: Tensor | None = None

    def of(self, part: Part) -> Tensor:
        """The prediction of that name. Raises ValueError where the objective's `needs` does not name it."""
        found: Tensor | None = getattr(self, part)
        if found is None:
            raise ValueError(f"the objective uses the prediction {part!r} but does not name it in `needs`")
        return found


@dataclass(frozen=True)
class Draws:
    """The inputs of the predictions. noise, noisy: `[N, C, H, W]`; times: `[N]`, of `process`. num_views: rows of a
    particle, which are adjacent."""

    samples: Samples
    times: Tensor
    noise: Tensor
    noisy: Tensor
    process: Process
    num_views: int


class Objective(Protocol):
    """A gradient at the latents. Without state: each rank and each resumed run builds it from the configuration."""

    @property
    def needs(self) -> frozenset[Part]:
        """The predictions that `gradient` reads. Nothing else is computed."""
        ...

    def gradient(self, predictions: Predictions, draws: Draws) -> Tensor:
        """d loss / d x_0, `[N, C, H, W]` float32. Row i depends only on the rows of its particle.

        The Jacobians of the encoder and of the renderer are applied to it later; those of the networks are left out, as
        in Eq. 9 (arXiv 2305.16213). Called on each rank with its own samples; does not communicate.
        """
        ...


def weighted_difference(eps: Tensor, other: Tensor, draws: Draws) -> Tensor:
    """w(t) (eps - other) / V: the form of Eq. 3 and Eq. 9 (arXiv 2305.16213), a mean over the V views of a particle."""
    weight = draws.process.weight(draws.times)
    return weight.reshape(-1, 1, 1, 1) * (eps - other) / draws.num_views
