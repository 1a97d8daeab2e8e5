"""The renderer on CUDA gives the images and gradients of the CPU, and each fast path those of its plain reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distvsd.config import NerfConfig
from distvsd.particles import NerfParticle
from distvsd.render import composite
from distvsd.render.volume import VolumeBackend
from distvsd.testing import check_particle, check_sampler
from distvsd.vsd.rng import Purpose, normal, uniform
from tests.gpu.drawn import SAMPLER, image_and_gradients

SMALL = NerfConfig(
    levels=2,
    features=4,
    log2_table_size=14,
    base_resolution=8,
    max_resolution=16,
    samples_per_ray=24,
    bound=0.6,
    blob_radius=0.4,
    init_scale=0.5,
    init_color=0.5,
    entropy=0.1,
    sparsity=0.1,
    coverage=0.1,
    coverage_range=(0.4, 0.6),
)


def rate(step: int) -> float:
    return 0.01


def nerf(backend: VolumeBackend = "torch", gather: bool = False, **fields: Any) -> NerfParticle:
    return NerfParticle(
        config=replace(SMALL, **fields),
        learning_rate=rate,
        network_learning_rate=rate,
        backend=backend,
        gather=gather,
        deterministic=False,
    )


def are_close(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.allclose(ours[0], theirs[0], atol=2e-4)
    for name, expected in theirs[1].items():
        error = (ours[1][name] - expected).norm() / expected.norm()
        assert error < 2e-3, f"gradient of {name}: relative error {error:.2g}"


def test_uniform_streams_are_the_same_bits_and_normal_ones_the_same_numbers(device: torch.device) -> None:
    ids = torch.tensor([0, 7, 2**31 - 1])
    here = uniform(3, Purpose.NOISE, ids, 12, (5, 33))
    assert torch.equal(uniform(3, Purpose.NOISE, ids.to(device), 12, (5, 33)).cpu(), here)
    here = normal(3, Purpose.NOISE, ids, 12, (5, 33))
    assert torch.allclose(normal(3, Purpose.NOISE, ids.to(device), 12, (5, 33)).cpu(), here, atol=1e-5)


@pytest.mark.parametrize("log2_table_size", [14, 7], ids=["dense", "hashed"])
def test_renders_and_gradients_are_those_of_the_cpu(device: torch.device, log2_table_size: int) -> None:
    particle = nerf(log2_table_size=log2_table_size)
    are_close(image_and_gradients(particle, device), image_and_gradients(particle, "cpu"))


def test_gathered_levels_are_those_read_by_grid_sample(device: torch.device) -> None:
    are_close(image_and_gradients(nerf(gather=True), device), image_and_gradients(nerf(gather=False), device))


def test_nerfacc_composites_as_the_reference(device: torch.device) -> None:
    pytest.importorskip("nerfacc")
    are_close(image_and_gradients(nerf(backend="nerfacc"), device), image_and_gradients(nerf(), device))


def test_nerfacc_weights_have_the_reference_gradient(device: torch.device) -> None:
    pytest.importorskip("nerfacc")
    ends = uniform(1, Purpose.SAMPLE, [0], 0, (64, 33))[0].sort(-1).values.to(device)
    color = uniform(1, Purpose.SAMPLE, [0], 1, (64, 32, 3))[0].to(device)
    start = 20 * uniform(1, Purpose.SAMPLE, [0], 2, (64, 32))[0].to(device)
    found = []
    for backend in ("torch", "nerfacc"):
        density = start.clone().requires_grad_()
        out = composite(ends[:, :-1], ends[:, 1:], density, color, backend)  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(out.color.square().sum() + out.depth.sum(), density)
        found.append((out.color.detach(), gradient))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    assert (found[0][1] - found[1][1]).norm() / found[0][1].norm() < 1e-4


@pytest.mark.parametrize("gather", [False, True])
def test_the_representation_conforms_on_this_device(device: torch.device, gather: bool) -> None:
    check_particle(nerf(gather=gather), device=device)


def test_the_sampler_conforms_on_this_device(device: torch.device) -> None:
    check_sampler(SAMPLER, distance=SAMPLER.config.distance, device=device)
