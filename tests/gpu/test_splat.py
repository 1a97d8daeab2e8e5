"""Splatting on CUDA: the same images and gradients as on the CPU, the same bits each time, and gsplat beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distvsd.config import GaussiansConfig
from distvsd.particles import GaussianParticle
from distvsd.render.splat import SplatBackend
from distvsd.testing import check_particle
from tests.gpu.drawn import image_and_gradients

SMALL = GaussiansConfig(
    capacity=300, init_color=1.0, relocate_every=2, noise=10.0, opacity=0.1, scale=0.1, sparsity=0.1, coverage=0.1
)


def gaussians(backend: SplatBackend = "torch") -> GaussianParticle:
    return GaussianParticle(config=SMALL, learning_rate=lambda step: 0.01, backend=backend, deterministic=False)


def are_close(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> None:
    # Where an alpha is 1/255 to rounding, one of the two may leave it out.
    assert float((ours[0] - theirs[0]).abs().max()) < 5e-3 and float((ours[0] - theirs[0]).abs().mean()) < 1e-4
    for name, expected in theirs[1].items():
        error = (ours[1][name] - expected).norm() / expected.norm()
        assert error < 2e-2, f"gradient of {name}: relative error {error:.2g}"


def test_renders_and_gradients_are_those_of_the_cpu(device: torch.device) -> None:
    are_close(image_and_gradients(gaussians(), device), image_and_gradients(gaussians(), "cpu"))


def test_gsplat_draws_as_the_reference(device: torch.device) -> None:
    pytest.importorskip("gsplat")
    are_close(image_and_gradients(gaussians("gsplat"), device), image_and_gradients(gaussians(), device))


def test_the_representation_conforms_on_this_device(device: torch.device) -> None:
    check_particle(gaussians(), device=device)


def test_deterministic_algorithms_give_the_same_bits_each_time(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        first, again = (image_and_gradients(gaussians(), device) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(value, again[1][name]) for name, value in first[1].items())
