"""What the loop needs of a score network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor
from torch.nn import Parameter

from distvsd.vsd.samples import Samples


class Score(Protocol):
    """A network that estimates the score of the rendered images' distribution (eps_phi of Eq. 9, arXiv 2305.16213).

    No method communicates. Every rank holds a replica; replicas stay equal because every rank calls `step` with the
    same gradient.
    """

    @property
    def num_timesteps(self) -> int:
        """T: timesteps are integers in [0, T)."""
        ...

    @property
    def trainable(self) -> Mapping[str, Parameter]:
        """Every parameter that is trained, float32, by the name it is saved under, in the order of a flat gradient."""
        ...

    def eps(self, noisy: Tensor, timesteps: Tensor, ids: Tensor, cameras: Tensor | None) -> Tensor:
        """The noise in `noisy` [N, C, h, w], float32, without a graph; ids [N] particle ids, timesteps [N] int64.

        cameras: [N, 16] flattened camera-to-world matrices; None asks for the estimate without a camera (ESD).
        """
        ...

    def loss(self, samples: Samples, timesteps: Tensor, noise: Tensor, keep_camera: Tensor) -> Tensor:
        """Denoising loss of each sample, [N] float32, a mean over latent elements; differentiable in `trainable`."""
        ...

    def gradients(
        self,
        samples: Samples,
        timesteps: Tensor,
        noise: Tensor,
        keep_camera: Tensor,
        denominator: float,
        micro_batches: Sequence[slice],
    ) -> tuple[list[Tensor], Tensor]:
        """One flat gradient [G] of sum(weight * loss) / denominator for each micro-batch, and the losses [N]."""
        ...

    def step(self, flat_gradient: Tensor, learning_rate: float) -> None:
        """One optimiser step with a flat gradient [G] float32, in the order of `trainable`."""
        ...

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Everything a bit-for-bit resume needs: tensors by name by relative file name; copies, on the CPU."""
        ...

    def texts(self) -> dict[str, str]:
        """The text files that belong next to `state`, by relative file name."""
        ...

    def load_state(self, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Inverse of `state`; raises CheckpointError when a file or tensor is missing or has another shape."""
        ...
