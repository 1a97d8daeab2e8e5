"""What pixels see of faces, and the gradients of it: against finite differences in float64 and by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distvsd.cameras import Cameras, rays
from distvsd.cameras.base import look_at_origin
from distvsd.render.meshes import Meshes
from distvsd.render.raster import rasterize
from distvsd.render.shade import Hits, antialias
from distvsd.render.tetrahedra import marching_tetrahedra, tet_grid

GRID = tet_grid(8, torch.device("cpu"))
RESOLUTION = 20


def cameras(particles: int = 1, views: int = 2, dtype: torch.dtype = torch.float64) -> Cameras:
    azimuth = torch.arange(particles * views, dtype=dtype).reshape(particles, views) * 0.9 + 0.2
    ones = torch.ones_like(azimuth)
    return look_at_origin(0.3 * ones, azimuth, 2.5 * ones, 0.9 * ones)


def bumpy(seed: int = 0) -> Meshes:
    """A closed mesh without symmetry."""
    generator = torch.Generator().manual_seed(seed)
    values = 0.6 - GRID.points.norm(dim=1) + 0.08 * torch.randn(len(GRID.points), generator=generator)
    meshes = marching_tetrahedra(GRID, values.double()[None], GRID.points.double())
    return Meshes(meshes.vertices.detach(), meshes.faces, meshes.vertex_ends, meshes.face_ends)


def drawn(meshes: Meshes, views: Cameras, resolution: int = RESOLUTION) -> Tensor:
    """Position, normal and opacity, with mixed edges, over zero: `[P, V, H, W, 7]`."""
    hits = Hits.of(meshes, rasterize(meshes, views, resolution), views)
    values = torch.cat((hits.positions, hits.normals, torch.ones_like(hits.depth)[:, None]), dim=1)
    return antialias(hits.onto(values.new_zeros(*views.shape, resolution, resolution, 7), values), hits, views)


def assert_gradient(of: Callable[[Tensor], Tensor], at: Tensor, directions: int = 6, step: float = 1e-7) -> None:
    """Central differences along random directions, and along those the gradient by autograd."""
    at = at.clone().requires_grad_()
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(of(at).shape, generator=generator, dtype=at.dtype)
    (gradient,) = torch.autograd.grad((of(at) * weights).sum(), at)
    for _ in range(directions):
        along = torch.randn(at.shape, generator=generator, dtype=at.dtype)
        with torch.no_grad():
            slope = ((of(at + step * along) - of(at - step * along)) * weights).sum() / (2 * step)
        assert slope.item() == pytest.approx((gradient * along).sum().item(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gradients_through_positions_normals_and_outlines_are_those_of_finite_differences(seed: int) -> None:
    meshes, views = bumpy(seed), cameras()

    def image(vertices: Tensor) -> Tensor:
        return drawn(Meshes(vertices, meshes.faces, meshes.vertex_ends, meshes.face_ends), views)

    assert_gradient(image, meshes.vertices)


def test_outlines_alone_have_a_gradient_and_only_at_the_vertices_that_they_pass() -> None:
    meshes, views = bumpy(), cameras(views=1)
    vertices = meshes.vertices.clone().requires_grad_()
    moving = Meshes(vertices, meshes.faces, meshes.vertex_ends, meshes.face_ends)
    drawn(moving, views)[..., 6].sum().backward()
    assert vertices.grad is not None
    moved = vertices.grad.norm(dim=1) > 0
    assert 5 < moved.sum() < len(vertices) / 2


def test_what_is_interpolated_lies_on_the_ray_at_the_depth_that_is_given() -> None:
    meshes, views = bumpy(), cameras()
    hits = Hits.of(meshes, rasterize(meshes, views, RESOLUTION), views)
    origins, directions = rays(views, RESOLUTION, RESOLUTION)
    view, place = hits.pixel // RESOLUTION**2, hits.pixel % RESOLUTION**2
    origin, direction = origins.reshape(-1, 3)[view], directions.reshape(-1, RESOLUTION**2, 3)[view, place]
    along = ((hits.positions - origin) * direction).sum(1)
    torch.testing.assert_close(hits.positions, origin + along[:, None] * direction)
    forward = -views.flatten().extrinsics[view, :3, 2]
    torch.testing.assert_close(hits.depth, along * (direction * forward).sum(1))
    torch.testing.assert_close(hits.shares.sum(1), torch.ones_like(hits.depth))


def test_normals_of_a_ball_point_away_from_its_centre() -> None:
    values = (0.6 - GRID.points.norm(dim=1)).double()[None]
    meshes, views = marching_tetrahedra(GRID, values, GRID.points.double()), cameras()
    hits = Hits.of(meshes, rasterize(meshes, views, 48), views)
    away = torch.nn.functional.normalize(hits.positions, dim=1)
    assert ((hits.normals * away).sum(1) > 0.98).double().mean() > 0.99


def square(edge: Tensor) -> Meshes:
    """In the plane x = 0, turned to +x."""
    half = edge / 2
    corners = torch.stack(
        [torch.stack((0 * half, y * half, z * half)) for y, z in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    )
    return Meshes.of([(corners, torch.tensor([[0, 1, 2], [0, 2, 3]]))])


def front(distance: float = 2.0) -> Cameras:
    """Sees an area of 2 by 2 at the origin."""
    zero = torch.zeros(1, 1, dtype=torch.float64)
    return look_at_origin(zero, zero, zero + distance, zero + 2 * math.atan(1 / distance))


@pytest.mark.parametrize("edge", [0.9, 1.01, 1.1, 1.234])
def test_the_opacity_of_a_square_is_its_area_and_so_is_its_gradient(edge: float) -> None:
    """In pixels of 1/16: (16 e)^2, up to the four corners, of one pixel each at most."""
    size = torch.tensor(edge, dtype=torch.float64, requires_grad=True)
    total = drawn(square(size), front(), 32)[..., 6].sum()
    assert total.item() == pytest.approx((16 * edge) ** 2, abs=1.01)
    total.backward()
    assert size.grad is not None
    assert size.grad.item() == pytest.approx(2 * 256 * edge, rel=0.08)


def test_edges_within_the_mesh_are_not_mixed() -> None:
    """The diagonal between two faces of a square is no outline."""
    meshes, views = square(torch.tensor(1.5, dtype=torch.float64)), front()
    hits = Hits.of(meshes, rasterize(meshes, views, 32), views)
    number = hits.onto(torch.zeros(1, 1, 32, 32, 1, dtype=torch.float64), hits.face[:, None].double() + 1)
    mixed = antialias(number, hits, views)
    assert torch.equal(mixed[0, 0, 8:24, 8:24], number[0, 0, 8:24, 8:24])


def test_where_one_surface_ends_before_another_their_colours_are_mixed() -> None:
    """A square of 1.1 in front of a larger one: 8.8 of the 16 columns on each side of the middle belong to the
    nearer."""
    near, far = square(torch.tensor(1.1, dtype=torch.float64)), square(torch.tensor(6.0, dtype=torch.float64))
    behind = far.vertices - torch.tensor([0.5, 0, 0], dtype=torch.float64)
    meshes = Meshes.of([(torch.cat((near.vertices, behind)), torch.cat((near.faces, near.faces + 4)))])
    views = front()
    hits = Hits.of(meshes, rasterize(meshes, views, 32), views)
    is_near = (hits.face < 2).double()[:, None]
    row = antialias(hits.onto(torch.zeros(1, 1, 32, 32, 1, dtype=torch.float64), is_near), hits, views)[0, 0, 16, :, 0]
    expected = torch.tensor([0.0] * 7 + [0.8] + [1.0] * 16 + [0.8] + [0.0] * 7, dtype=torch.float64)
    torch.testing.assert_close(row, expected)


def test_an_outline_behind_another_surface_mixes_nothing() -> None:
    near, far = square(torch.tensor(1.8, dtype=torch.float64)), square(torch.tensor(0.8, dtype=torch.float64))
    behind = far.vertices - torch.tensor([0.2, 0, 0], dtype=torch.float64)
    meshes = Meshes.of([(torch.cat((near.vertices, behind)), torch.cat((near.faces, near.faces + 4)))])
    views = front()
    hits = Hits.of(meshes, rasterize(meshes, views, 32), views)
    noise = torch.rand(1, 1, 32, 32, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inner = (0, 0, slice(4, 28), slice(4, 28))
    assert torch.equal(antialias(noise, hits, views)[inner], noise[inner])


def test_a_particle_looks_the_same_alone_and_in_a_batch() -> None:
    first, second = bumpy(0), bumpy(1)
    both = Meshes.of([first.one(0), second.one(0)])
    views = cameras(particles=2)
    together = drawn(both, views)
    for row, alone in enumerate((first, second)):
        torch.testing.assert_close(together[row], drawn(alone, views[row : row + 1])[0], rtol=1e-12, atol=1e-12)


def test_values_are_gathered_by_particle_and_found_again() -> None:
    both = Meshes.of(
        [bumpy(0).one(0), (torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0, 3).long()), bumpy(1).one(0)]
    )
    views = cameras(particles=3)
    hits = Hits.of(both, rasterize(both, views, RESOLUTION), views)
    rows, place = hits.by_particle(hits.positions)
    assert rows.shape[0] == 3
    assert torch.equal(rows.flatten(0, 1)[place], hits.positions)
    assert torch.equal(place // rows.shape[1], both.face_owners[hits.face])


def test_an_empty_mesh_leaves_the_background_and_has_no_gradient() -> None:
    vertices = torch.zeros(0, 3, dtype=torch.float64, requires_grad=True)
    empty = Meshes(vertices, torch.zeros(0, 3, dtype=torch.int64), (0,), (0,))
    assert not drawn(empty, cameras()).any()
