"""Encodes renders for the networks: latents with the graph to the particles, and the data that goes with each."""

from __future__ import annotations

import torch
from torch import Tensor

from distvsd.config import Config
from distvsd.faults import poison
from distvsd.particles import Ensemble, Views
from distvsd.particles.recompute import checkpointed
from distvsd.prior.pipeline import Pipeline
from distvsd.prior.prompts import view_indices
from distvsd.score.camera import CAMERA_FEATURES
from distvsd.vsd.samples import Samples


class Encoder:
    """Encodes what the ensemble renders; local. Called with the views of a round and their resolution."""

    def __init__(self, config: Config, prior: Pipeline, ensemble: Ensemble) -> None:
        self._config, self._prior, self._ensemble = config, prior, ensemble
        self._encode = checkpointed(prior.encode) if config.particles.recompute else prior.encode

    def __call__(self, views: list[Views], resolution: int) -> Samples:
        """Latents with the graph, camera matrices, ids, named views, and weights.

        The weight is 0 for a particle with latents that are not finite and for one in quarantine, else 1.
        """
        is_latent = self._ensemble.particle.is_latent
        edge = self._config.render.encoded_edge(resolution, self._prior.resolution, is_latent)
        absent = torch.tensor(self._ensemble.quarantined, dtype=torch.int64, device=self._prior.device)
        parts = [self._samples(view, edge, absent) for view in views]
        if not parts:
            return self._none(edge)
        return parts[0] if len(parts) == 1 else Samples.cat(parts)

    def _samples(self, view: Views, edge: int, absent: Tensor) -> Samples:
        num_views = self._config.particles.views
        images = view.rendered.images.flatten(0, 1)
        ids = view.ids.repeat_interleave(num_views)
        encoded = images if self._ensemble.particle.is_latent else self._encode(images, edge)
        latents = poison("latent", encoded, ids)
        cameras = view.cameras.flatten()
        return Samples(
            latents,
            cameras.extrinsics.flatten(1).float(),
            ids,
            view_indices(cameras.elevation, cameras.azimuth),
            (_finite(latents, num_views) & ~torch.isin(ids, absent)).float(),
        )

    def _none(self, edge: int) -> Samples:
        """The samples of a rank without particles: zero rows, as wide as the rows of the other ranks."""
        device = self._prior.device
        empty = torch.zeros(0, dtype=torch.int64, device=device)
        return Samples(
            torch.zeros(0, *self._prior.latent_shape(edge), device=device),
            torch.zeros(0, CAMERA_FEATURES, device=device),
            empty,
            empty,
            torch.zeros(0, device=device),
        )


def _finite(latents: Tensor, num_views: int) -> Tensor:
    """Bool `[N]`: whether all views of the row's particle are finite."""
    rows = latents.detach().flatten(1).isfinite().all(1)
    return rows.reshape(-1, num_views).all(1).repeat_interleave(num_views)
