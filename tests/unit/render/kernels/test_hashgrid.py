"""The hash grid's kernels: the plain reference's values and gradients, float64 finite differences, and the borders."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distvsd.config import NerfConfig
from distvsd.errors import BackendError
from distvsd.render.hashgrid import HashGrid, grid_backend
from distvsd.render.kernels import what_is_missing

CPU = torch.device("cpu")
# Dense levels of 4 and 8 vertices, or the last one hashed where the table has 2^6 entries.
SHAPE = NerfConfig(levels=2, features=2, log2_table_size=12, base_resolution=4, max_resolution=8, smoothstep=False)
HASHED = {"log2_table_size": 6}
MANY = {"levels": 2, "features": 3, "log2_table_size": 4, "max_resolution": 40}  # every vertex shares its entry


def pair(**fields: Any) -> tuple[HashGrid, HashGrid]:
    """The kernels and the reference, of one shape."""
    config = replace(SHAPE, **fields)
    return HashGrid(config, backend="triton"), HashGrid(config, gather=True)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def read_with_gradients(grid: HashGrid, tables: dict[str, Tensor], points: Tensor) -> list[Tensor]:
    """Features, then the gradients of a weighted sum of them by the tables and by the points."""
    leaves = {name: table.clone().requires_grad_() for name, table in tables.items()}
    where = points.clone().requires_grad_()
    features = grid.encode(leaves, where)
    weights = torch.arange(features.numel(), dtype=features.dtype).reshape(features.shape).cos()
    found = torch.autograd.grad((features * weights).sum(), [*leaves.values(), where])
    return [features.detach(), *found]


@pytest.mark.parametrize("smoothstep", [False, True])
@pytest.mark.parametrize("fields", [{}, HASHED, MANY], ids=["dense", "hashed", "colliding"])
def test_values_and_gradients_are_those_of_the_reference(fields: dict[str, int], smoothstep: bool) -> None:
    kernel, reference = pair(**fields, smoothstep=smoothstep)
    tables = reference.init(0, torch.tensor([3, 1]), 1.0)
    points = drawn(2, 70, 3)
    values, *gradients = read_with_gradients(kernel, tables, points)
    expected, *expected_gradients = read_with_gradients(reference, tables, points)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_dense_levels_are_those_that_grid_sample_reads() -> None:
    kernel, _ = pair(smoothstep=True)
    tables = kernel.init(0, torch.tensor([3]), 1.0)
    fast = HashGrid(kernel.config)
    torch.testing.assert_close(
        kernel.encode(tables, drawn(1, 50, 3)), fast.encode(tables, drawn(1, 50, 3)), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("fields", [{}, HASHED], ids=["dense", "hashed"])
@pytest.mark.parametrize("smoothstep", [False, True])
def test_gradients_agree_with_finite_differences_in_float64(fields: dict[str, int], smoothstep: bool) -> None:
    kernel, _ = pair(**fields, levels=1, features=1, base_resolution=5, max_resolution=5, smoothstep=smoothstep)
    start = {name: table.double().requires_grad_() for name, table in kernel.init(0, torch.tensor([1]), 1.0).items()}
    names, points = list(start), drawn(1, 2, 3, seed=2, dtype=torch.float64).requires_grad_()

    def read(*arguments: Tensor) -> Tensor:
        return kernel.encode(dict(zip(names, arguments[:-1], strict=True)), arguments[-1])

    # fast_mode: one direction instead of one call for each entry, which an interpreter would take minutes for.
    assert torch.autograd.gradcheck(read, (*start.values(), points), eps=1e-6, atol=1e-6, fast_mode=True)


def test_several_particles_are_the_bits_of_one_at_a_time() -> None:
    kernel, _ = pair(**HASHED, smoothstep=True)
    tables, points = kernel.init(0, torch.tensor([4, 0, 9]), 1.0), drawn(3, 33, 3)
    together = kernel.encode(tables, points)
    alone = [
        kernel.encode({name: table[row : row + 1] for name, table in tables.items()}, points[row : row + 1])
        for row in range(3)
    ]
    assert torch.equal(together, torch.cat(alone))


def test_points_on_the_faces_and_beyond_read_the_faces_and_get_the_reference_gradient() -> None:
    kernel, reference = pair(smoothstep=False)
    tables = kernel.init(0, torch.tensor([4]), 1.0)
    outside = torch.tensor([[[0.0, 0, 0], [1, 1, 1], [-3, 0.5, 0.2], [1, 7, 1], [0.5, -0.0, 1e9], [0.3, -1e-9, 0.4]]])
    for found, wanted in zip(*(read_with_gradients(one, tables, outside) for one in (kernel, reference)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_a_point_that_is_not_a_number_is_nan_and_touches_no_other() -> None:
    kernel, _ = pair(**HASHED)
    tables, points = kernel.init(0, torch.tensor([4, 5]), 1.0), drawn(2, 9, 3)
    clean, clean_gradient = read_with_gradients(kernel, tables, points)[:2]
    points[1, 4, 2] = torch.nan
    found, gradient = read_with_gradients(kernel, tables, points)[:2]
    assert found[1, :, 4].isnan().all() and torch.equal(found[0], clean[0])
    others = torch.arange(9) != 4
    assert torch.equal(found[1][:, others], clean[1][:, others]) and torch.equal(gradient[0], clean_gradient[0])


@pytest.mark.parametrize("count", [1, 255, 256, 257])
def test_blocks_need_not_be_full(count: int) -> None:
    kernel, reference = pair(levels=1, max_resolution=4)
    tables, points = kernel.init(0, torch.tensor([4]), 1.0), drawn(1, count, 3)
    for found, wanted in zip(*(read_with_gradients(one, tables, points) for one in (kernel, reference)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("particles", "count"), [(0, 5), (2, 0)])
def test_no_particles_or_no_points_give_empty_features_and_zero_gradients(particles: int, count: int) -> None:
    kernel, _ = pair()
    tables = kernel.init(0, torch.arange(particles), 1.0)
    features, *gradients = read_with_gradients(kernel, tables, drawn(particles, count, 3))
    assert features.shape == (particles, 4, count) and not any(gradient.any() for gradient in gradients)


def test_gradients_that_nobody_asks_for_are_left_out() -> None:
    kernel, _ = pair()
    tables, points = kernel.init(0, torch.tensor([4]), 1.0), drawn(1, 5, 3)
    whole = read_with_gradients(kernel, tables, points)
    leaf = tables["grid0"].clone().requires_grad_()
    features = kernel.encode(tables | {"grid0": leaf}, points)
    weights = torch.arange(features.numel(), dtype=features.dtype).reshape(features.shape).cos()
    (only,) = torch.autograd.grad((features * weights).sum(), leaf)
    torch.testing.assert_close(only, whole[1])
    where = points.clone().requires_grad_()
    (moved,) = torch.autograd.grad((kernel.encode(tables, where) * weights).sum(), where)
    torch.testing.assert_close(moved, whole[-1])


def test_colliding_vertices_add_up_in_their_entry() -> None:
    """A constant gradient: what all entries get together is the number of points, wherever they collide."""
    kernel, _ = pair(**MANY)
    tables = {name: table.requires_grad_() for name, table in kernel.init(0, torch.tensor([4]), 1.0).items()}
    found = torch.autograd.grad(kernel.encode(tables, drawn(1, 100, 3)).sum(), list(tables.values()))
    for gradient in found:
        torch.testing.assert_close(gradient.flatten(2).sum(2), torch.full((1, 3), 100.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tables_of_half_precision_are_read_in_float32_and_get_gradients_of_their_own_type(dtype: torch.dtype) -> None:
    kernel, _ = pair(**HASHED)
    tables = {name: table.to(dtype) for name, table in kernel.init(0, torch.tensor([4]), 1.0).items()}
    values, gradient = read_with_gradients(kernel, tables, drawn(1, 20, 3))[:2]
    whole = {name: table.float() for name, table in tables.items()}
    expected, expected_gradient = read_with_gradients(kernel, whole, drawn(1, 20, 3))[:2]
    assert values.dtype == torch.float32 and torch.equal(values, expected)
    assert gradient.dtype == dtype and torch.equal(gradient, expected_gradient.to(dtype))


@pytest.mark.parametrize(
    ("asked", "numerics", "device", "chosen"),
    [
        ("auto", "fast", "cpu", "torch"),
        ("auto", "exact", "cuda", "torch"),
        ("auto", "fast", "cuda", "triton"),
        ("torch", "exact", "cuda", "torch"),
        ("triton", "fast", "cuda", "triton"),
        ("triton", "fast", "cpu", "triton"),
    ],
)
def test_auto_takes_the_kernels_on_a_gpu_whose_sums_need_no_order(
    asked: Any, numerics: Any, device: str, chosen: str
) -> None:
    assert grid_backend(asked, numerics, torch.device(device)) == chosen


@pytest.mark.parametrize(
    ("asked", "numerics", "device", "words"),
    [
        ("triton", "exact", "cuda", r"grid_backend is triton.*exact"),
        ("tinycudann", "exact", "cuda", r"grid_backend is tinycudann.*exact"),
        ("tinycudann", "fast", "cpu", r"grid_backend is tinycudann.*needs CUDA.*torch"),
        ("tinycudann", "fast", "cuda", r"grid_backend is tinycudann.*not installed.*torch"),
    ],
)
def test_what_cannot_be_used_is_refused(asked: Any, numerics: Any, device: str, words: str) -> None:
    with pytest.raises(BackendError, match=words):
        grid_backend(asked, numerics, torch.device(device))


def test_without_triton_auto_is_torch_and_asking_for_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distvsd.render.kernels.find_spec", lambda name: None)
    assert grid_backend("auto", "fast", torch.device("cuda")) == "torch"
    with pytest.raises(BackendError, match=r"not installed; install it with.*distvsd\[cuda\]"):
        grid_backend("triton", "fast", torch.device("cuda"))
    with pytest.raises(BackendError, match="not installed"):
        pair()[0].encode(pair()[1].init(0, torch.tensor([0]), 1.0), drawn(1, 2, 3))


def test_on_the_cpu_the_kernels_run_in_the_interpreter_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert what_is_missing(CPU) is None
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(BackendError, match=r"CUDA, not on cpu.*TRITON_INTERPRET=1"):
        grid_backend("triton", "fast", CPU)
