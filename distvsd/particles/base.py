"""What a representation must offer: how its particles begin, and how they are drawn. Batched, stateless.

The parameters of P particles are one dictionary of tensors with a leading axis of P; the ensemble owns them. A
representation knows nothing of guidance, of ranks and of files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from distvsd.cameras import Cameras

Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class Keys:
    """Keys of the random draws of one render: the streams of particles `ids` `[P]` at round `step` of run `seed`."""

    seed: int
    ids: Tensor
    step: int


@dataclass(frozen=True)
class Rendered:
    """images `[P, V, C, H, W]` float32: RGB in [0, 1], or latents where the particle says so. opacity `[P, V, 1, H,
    W]`.

    penalty `[P]`: the regularisers of each particle, weighted, to be minimised beside the guidance.
    """

    images: Tensor
    opacity: Tensor
    penalty: Tensor


class Particle(Protocol):
    """One kind of particle. Every method is local, communicates nothing, and treats particles independently:

    row i of the result depends on row i of the parameters, of the cameras and of the ids only.
    """

    @property
    def is_latent(self) -> bool:
        """True where `render` returns latents of the prior, which are not encoded again."""
        ...

    @property
    def deterministic(self) -> bool:
        """True where the same call gives the same bits, forward and backward, on this device."""
        ...

    def init(self, seed: int, ids: Tensor) -> Parameters:
        """Fresh parameters for particles `ids` `[P]`, each from its own stream; float32, on the device of `ids`.

        For no ids too, with the same names and shapes `[0, ...]`: what a checkpoint must hold is known from that.
        """
        ...

    def learning_rates(self, step: int) -> dict[str, float]:
        """The learning rate of each parameter at this round."""
        ...

    def render(self, parameters: Parameters, cameras: Cameras, resolution: int, keys: Keys) -> Rendered:
        """The training render of P particles from cameras `[P, V]`, square images; differentiable in the parameters."""
        ...

    def view(self, parameters: Parameters, cameras: Cameras, resolution: int, background: float) -> Rendered:
        """The same without anything random, on a plain grey background in [0, 1]; for looking and evaluating."""
        ...
