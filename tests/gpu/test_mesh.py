"""Meshes on CUDA: the same images and gradients as on the CPU, and nvdiffrast beside the rasteriser in torch."""

from __future__ import annotations

import pytest
import torch

from distvsd.config import NerfConfig
from distvsd.config.mesh import MeshConfig
from distvsd.particles import MeshParticle, NerfParticle
from distvsd.render.raster import RasterBackend, rasterize
from distvsd.testing import check_particle
from tests.gpu.drawn import SAMPLER, image_and_gradients

NERF = NerfConfig(levels=2, base_resolution=8, max_resolution=16, bound=0.6, blob_radius=0.4, init_color=2.0)


def rate(step: int) -> float:
    return 0.01


def mesh(backend: RasterBackend = "torch") -> MeshParticle:
    return MeshParticle(
        config=MeshConfig(grid=16, trained="both", normal_consistency=1.0, laplacian=1.0),
        field_particle=NerfParticle(config=NERF, learning_rate=rate, network_learning_rate=rate),
        learning_rate=rate,
        backend=backend,
        deterministic=False,
    )


def test_renders_and_gradients_are_those_of_the_cpu(device: torch.device) -> None:
    """A ray through the side of a face may go to the other face, so few pixels may differ."""
    (ours, gradients), (theirs, expected) = (image_and_gradients(mesh(), place) for place in (device, "cpu"))
    assert float(((ours - theirs).abs() > 1e-3).float().mean()) < 2e-3
    for name, value in expected.items():
        assert (gradients[name] - value).norm() < 5e-2 * value.norm(), name


@pytest.mark.parametrize("backend", ["nvdiffrast", "drtk"])
def test_a_library_sees_the_faces_that_the_reference_sees(device: torch.device, backend: RasterBackend) -> None:
    pytest.importorskip(backend)
    ids = torch.tensor([4, 0, 9], device=device)
    particle, cameras = mesh(), SAMPLER.sample(5, ids, 3, 2, None)
    meshes = particle.meshes(particle.init(5, ids))
    found, expected = (rasterize(meshes, cameras, 64, backend).face for backend in (backend, "torch"))
    assert float((found != expected).float().mean()) < 2e-3


def test_the_representation_conforms_on_this_device(device: torch.device) -> None:
    check_particle(mesh(), device=device)
