"""Meshes from values on a lattice: closed, turned outwards, where the values say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distvsd.render.meshes import Meshes
from distvsd.render.tetrahedra import level_values, marching_tetrahedra, number_of_points, tet_grid

CPU = torch.device("cpu")
GRID = tet_grid(12, CPU)


def volumes(meshes: Meshes) -> Tensor:
    """Enclosed volume of each closed mesh by the divergence theorem; positive if it is turned outwards."""
    a, b, c = meshes.corners.unbind(1)
    parts = (a * torch.linalg.cross(b, c)).sum(1) / 6
    return torch.zeros(len(meshes), dtype=parts.dtype).index_add(0, meshes.face_owners, parts)


def ball(radius: float, center: tuple[float, float, float] = (0, 0, 0)) -> Tensor:
    return radius - (GRID.points - torch.tensor(center)).norm(dim=1)


def test_the_tetrahedra_of_the_lattice_are_alike_and_fill_all_but_the_outermost_half_cells() -> None:
    assert len(GRID.points) == number_of_points(12) == 13**3 + 12**3
    a, b, c, d = GRID.points[GRID.tets].unbind(1)
    volume = torch.linalg.det(torch.stack((b - a, c - a, d - a), dim=1)) / 6
    # A pair of neighbouring centres is a cell apart, and so are the corners across: (1/6) cell^2 (cell / 2).
    torch.testing.assert_close(volume, torch.full_like(volume, GRID.cell**3 / 12))
    # Each of the 6 * 12^2 outer faces misses a pyramid of a sixth of a cube.
    torch.testing.assert_close(volume.sum(), torch.tensor(8 - 6 * 12**2 * GRID.cell**3 / 6))


def test_the_mesh_of_a_plane_is_that_plane_with_the_area_between_the_borders() -> None:
    """Linear values are interpolated without an error."""
    normal = torch.nn.functional.normalize(torch.tensor([1.0, 2.0, -0.5]), dim=0)
    meshes = marching_tetrahedra(GRID, (0.1 - GRID.points @ normal)[None], GRID.points)
    inner = meshes.vertices.abs().amax(1) < 1 - 2 * GRID.cell
    assert inner.sum() > 100
    torch.testing.assert_close(meshes.vertices[inner] @ normal, torch.full((int(inner.sum()),), 0.1), atol=1e-5, rtol=0)
    flat = inner[meshes.faces].all(1)
    turned = torch.nn.functional.normalize(meshes.area_normals[flat], dim=1) @ normal
    solid = meshes.area_normals[flat].norm(dim=1) > 1e-5
    assert (turned[solid] > 0.999).all(), "values fall along the normal, so it points outwards"


@pytest.mark.parametrize("radius", [0.3, 0.55, 0.8])
def test_the_mesh_of_a_ball_is_closed_turned_outwards_and_as_large_as_the_ball(radius: float) -> None:
    meshes = marching_tetrahedra(GRID, ball(radius)[None], GRID.points)
    assert meshes.edges.is_inner.all()
    vertices, edges, faces = len(meshes.vertices), len(meshes.edges.vertices), len(meshes.faces)
    assert vertices - edges + faces == 2, "Euler: one sphere"
    expected = 4 / 3 * math.pi * radius**3
    assert volumes(meshes).item() == pytest.approx(expected, rel=0.008 / radius**2)


def test_meshes_of_a_batch_are_those_of_each_alone() -> None:
    values = torch.stack((ball(0.5), torch.full_like(ball(0), -1.0), ball(0.3, (0.2, -0.1, 0.3))))
    together = marching_tetrahedra(GRID, values, GRID.points)
    assert len(together) == 3
    for row in range(3):
        alone = marching_tetrahedra(GRID, values[row : row + 1], GRID.points)
        for found, expected in zip(together.one(row), alone.one(0), strict=True):
            assert torch.equal(found, expected)
    assert len(together.one(1)[0]) == 0


def test_a_ball_that_reaches_beyond_the_lattice_is_closed_at_its_border() -> None:
    meshes = marching_tetrahedra(GRID, ball(5.0)[None], GRID.points)
    assert meshes.edges.is_inner.all()
    assert 0 < volumes(meshes).item() < 8


def test_gradients_move_the_surface_as_the_values_say() -> None:
    """All values of a ball rise by dr: its volume rises by its area times dr."""
    rise = torch.zeros((), dtype=torch.float64, requires_grad=True)
    meshes = marching_tetrahedra(GRID, (ball(0.5).double() + rise)[None], GRID.points.double())
    volumes(meshes).sum().backward()
    assert rise.grad is not None
    assert rise.grad.item() == pytest.approx(4 * math.pi * 0.25, rel=0.03)


def test_gradients_in_values_and_points_are_those_of_finite_differences() -> None:
    grid = tet_grid(3, CPU)
    generator = torch.Generator().manual_seed(3)
    values = (0.5 - grid.points.norm(dim=1) + 0.05 * torch.randn(len(grid.points), generator=generator)).double()[None]
    points = grid.points.double()[None] + 0.01 * torch.randn(1, *grid.points.shape, generator=generator)
    weights = torch.randn(len(marching_tetrahedra(grid, values, points).vertices), 3, generator=generator)

    def total(values: Tensor, points: Tensor) -> Tensor:
        return (marching_tetrahedra(grid, values, points).vertices * weights).sum()

    inputs = (values.requires_grad_(), points.requires_grad_())
    assert torch.autograd.gradcheck(total, inputs, eps=1e-7, atol=1e-5)


def test_a_threshold_that_no_density_reaches_is_halved_until_one_does() -> None:
    """10, 5, 2.5, 1.25: the fourth is below a density of 2."""
    inside = GRID.points.norm(dim=1) < 0.5
    density = torch.stack(
        (torch.where(inside, 20.0, 0.1), torch.where(inside, 2.0, 0.1), torch.full_like(ball(0), 0.1))
    )
    values = level_values(GRID, density, 10.0)
    assert torch.equal(values[:2] > 0, inside.expand(2, -1))
    middle = int(GRID.points.norm(dim=1).argmin())
    assert values[0, middle].item() == pytest.approx(math.log(20 / 10))
    assert values[1, middle].item() == pytest.approx(math.log(2 / 1.25), abs=1e-5)
    # 0.1 is below 10 / 2^6, which is the last that is tried.
    assert not (values[2] > 0).any()


def test_values_that_are_not_numbers_give_vertices_that_are_none_and_leave_other_particles_alone() -> None:
    values = torch.stack((ball(0.5), ball(0.5)))
    values[0, int(GRID.points.norm(dim=1).argmin())] = torch.nan
    meshes = marching_tetrahedra(GRID, values, GRID.points)
    assert not meshes.one(0)[0].isfinite().all()
    alone = marching_tetrahedra(GRID, values[1:], GRID.points)
    assert torch.equal(meshes.one(1)[0], alone.vertices)
