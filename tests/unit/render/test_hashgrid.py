"""The hash grid: its levels, exact interpolation of what a grid can hold, gradients, and its plain reference."""

import pytest
import torch

from distvsd.config import NerfConfig
from distvsd.render.hashgrid import HashGrid, gather_level


def grid(gather=False, **fields):
    shape = {"levels": 2, "features": 3, "log2_table_size": 12, "base_resolution": 4, "max_resolution": 8}
    return HashGrid(NerfConfig(**({"smoothstep": False} | shape | fields)), gather)


def test_resolutions_grow_geometrically_from_base_to_max():
    # Instant-NGP's own example: 16 levels from 16 to 2048 grow by 2^(7/15) = 1.3819.
    resolutions = grid(levels=16, base_resolution=16, max_resolution=2048).resolutions()
    assert resolutions[:4] == [16, 22, 30, 42] and resolutions[-1] == 2048
    assert grid(levels=1).resolutions() == [4]


def test_levels_that_fit_are_dense_and_the_others_have_a_table():
    shapes = {
        name: tuple(value.shape)
        for name, value in grid(log2_table_size=7, features=2).init(0, torch.tensor([5, 6]), 1.0).items()
    }
    assert shapes == {"grid0": (2, 2, 4, 4, 4), "grid1": (2, 2, 128)}


def test_every_particle_begins_from_its_own_stream():
    both = grid().init(0, torch.tensor([5, 6]), 0.1)["grid0"]
    assert torch.equal(both[1], grid().init(0, torch.tensor([6]), 0.1)["grid0"][0])
    assert (both[0] == both[1]).float().mean() < 0.01 and both.abs().max() <= 0.1


def test_a_linear_function_is_interpolated_exactly():
    resolution = 5
    axis = torch.linspace(0, 1, resolution, dtype=torch.float64)
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    values = (2 * x - 3 * y + 5 * z + 1)[None, None]
    one = grid(levels=1, base_resolution=resolution, features=1)
    points = torch.rand(1, 200, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = points @ torch.tensor([2.0, -3.0, 5.0], dtype=torch.float64) + 1
    torch.testing.assert_close(one.encode({"grid0": values}, points)[:, 0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("smoothstep", [False, True])
def test_the_fast_path_agrees_with_the_reference_in_value_and_gradient(smoothstep):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(2, 3, 6, 6, 6, dtype=torch.float64, generator=generator)
    points = torch.rand(2, 40, 3, dtype=torch.float64, generator=generator)
    results = []
    for gather in (False, True):
        leaf, where = table.clone().requires_grad_(), points.clone().requires_grad_()
        one = grid(levels=1, base_resolution=6, smoothstep=smoothstep, gather=gather)
        out = one.encode({"grid0": leaf}, where)
        (out * torch.arange(out.numel(), dtype=torch.float64).reshape(out.shape).cos()).sum().backward()
        results.append((out.detach(), leaf.grad, where.grad))
    for fast, reference in zip(*results, strict=True):
        torch.testing.assert_close(fast, reference, rtol=0, atol=1e-10)


def test_points_on_the_faces_and_beyond_read_the_faces():
    table = torch.rand(1, 1, 4, 4, 4, dtype=torch.float64)
    one = grid(levels=1, features=1)
    ends = torch.tensor([[[0.0, 0, 0], [1, 1, 1], [-3, 0, 0], [1, 7, 1]]], dtype=torch.float64)
    values = one.encode({"grid0": table}, ends)[0, 0]
    corners = [table[0, 0, 0, 0, 0], table[0, 0, 3, 3, 3]] * 2
    torch.testing.assert_close(values, torch.stack(corners))


def test_the_spatial_hash_is_that_of_instant_ngp():
    # Vertex (1, 2, 3): 1 ^ (2 * 2654435761) ^ (3 * 805459861) modulo the table size, worked out in Python integers.
    size = 1000
    slot = (1 ^ (2 * 2654435761) ^ (3 * 805459861)) % size
    table = torch.zeros(1, 1, size)
    table[0, 0, slot] = 7.0
    value = gather_level(table, 16, torch.tensor([[[1.0, 2.0, 3.0]]]), smoothstep=False, hashed=True)
    assert value.item() == 7.0


@pytest.mark.parametrize("log2_table_size", [12, 5])
def test_gradients_agree_with_finite_differences(log2_table_size):
    one = grid(log2_table_size=log2_table_size, features=1, smoothstep=True)
    start = {name: value.double().requires_grad_() for name, value in one.init(0, torch.tensor([1]), 1.0).items()}
    points = torch.rand(1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    names = list(start)

    def read(*arguments):
        return one.encode(dict(zip(names, arguments[:-1], strict=True)), arguments[-1])

    assert torch.autograd.gradcheck(read, (*start.values(), points), eps=1e-6, atol=1e-6)
