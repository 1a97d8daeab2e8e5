"""Textures: charts, which triangle a texel belongs to, baked colours, and what surrounds a chart."""

import sys

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distvsd.errors import BackendError
from distvsd.looking import atlas
from tests.unit.looking.solids import by_place, cube


def shares_everywhere(corners, edge):
    """Barycentric coordinates [M, E, E, 3] of every texel centre in every triangle, by solving for them."""
    rows, columns = numpy.meshgrid(numpy.arange(edge) + 0.5, numpy.arange(edge) + 0.5, indexing="ij")
    a, b, c = (corners[:, k, None, None] for k in range(3))
    centers = numpy.stack((columns, rows), axis=-1)[None]
    matrix = numpy.broadcast_to(numpy.stack((b - a, c - a), axis=-1), (len(corners), edge, edge, 2, 2))
    second = numpy.linalg.solve(matrix, (centers - a)[..., None])[..., 0]
    return numpy.concatenate((1 - second.sum(-1, keepdims=True), second), axis=-1)


@pytest.fixture(scope="module")
def box():
    """A cube with the charts of a texture of 96 texels: vertices, faces, coordinates, the edge."""
    pytest.importorskip("xatlas")
    vertices, faces = cube()
    source, new_faces, coordinates = atlas.unwrap(vertices, faces, 96)
    return vertices[source], new_faces, coordinates, 96


def test_a_layout_keeps_the_triangles_in_their_order_and_their_shape(box):
    vertices, faces, coordinates, edge = box
    old_vertices, old_faces = cube()
    assert torch.equal(vertices[faces], old_vertices[old_faces])
    assert float(coordinates.min()) >= 0 and float(coordinates.max()) <= 1
    flat, solid = coordinates[faces].double() * edge, vertices[faces].double()
    # All edges are stretched alike: 1 world unit is as many texels everywhere, and nothing is squeezed.
    sizes = [(corners - corners.roll(1, dims=1)).norm(dim=-1) for corners in (flat, solid)]
    assert (sizes[0] / sizes[1]).std() / (sizes[0] / sizes[1]).mean() < 1e-4


def test_charts_do_not_overlap_and_keep_a_distance(box):
    _, faces, coordinates, edge = box
    shares = shares_everywhere(coordinates[faces].double().numpy() * edge, edge)
    inside = (shares > 1e-6).all(-1)
    assert inside.sum(0).max() == 1
    assert inside.any(0).mean() > 0.3
    # Two texels at most three apart are on the same chart: their world points are near each other.
    vertices = box[0].numpy()[faces.numpy()]
    world = numpy.full((edge, edge, 3), numpy.nan)
    triangle, row, column = inside.nonzero()
    world[row, column] = (shares[triangle, row, column][..., None] * vertices[triangle]).sum(1)
    texel = 6 / numpy.sqrt(inside.sum())  # about the world size of one: the surface of the cube is 6
    for shift in (1, 2, 3):
        for axis in (0, 1):
            apart = numpy.linalg.norm(
                numpy.diff(world[:: 1 if axis else shift, :: shift if axis else 1], axis=axis), axis=-1
            )
            assert numpy.nanmax(apart) < 2 * shift * texel


@settings(max_examples=60, deadline=None)
@given(numbers=st.lists(st.floats(-2, 14, width=32), min_size=6, max_size=24))
def test_texels_belong_to_the_triangle_over_their_centre(numbers):
    corners = torch.tensor(numbers[: len(numbers) // 6 * 6], dtype=torch.float64).reshape(-1, 3, 2)
    sides = corners[:, 1:] - corners[:, :1]
    corners = corners[torch.linalg.det(sides).abs() > 1e-3]
    owners = atlas.texel_owners(corners, 12).numpy()
    if not len(corners):
        assert (owners == -1).all()
        return
    shares = shares_everywhere(corners.numpy(), 12)
    surely, perhaps = (shares > 1e-7).all(-1), (shares > -1e-7).all(-1)
    assert not (surely.any(0) & (owners < 0)).any()
    row, column = (owners >= 0).nonzero()
    assert perhaps[owners[row, column], row, column].all()


def test_a_texel_on_the_side_of_two_triangles_belongs_to_one_and_none_is_forgotten():
    square = torch.tensor([[[0.0, 0], [8, 0], [8, 8]], [[0, 0], [8, 8], [0, 8]]], dtype=torch.float64)
    owners = atlas.texel_owners(square, 8)
    assert bool((owners >= 0).all())
    above = torch.arange(8)[None] > torch.arange(8)[:, None]
    assert bool((owners[above] == 0).all()) and bool((owners[above.T] == 1).all())


@settings(max_examples=60, deadline=None)
@given(numbers=st.lists(st.floats(-2, 10, width=32), min_size=6, max_size=6))
def test_a_triangle_is_at_every_texel_that_it_touches_and_at_no_other(numbers):
    corners = torch.tensor(numbers, dtype=torch.float64).reshape(1, 3, 2)
    found = (atlas.texel_owners(corners, 8, reach=0.5) == 0).numpy()
    steps = torch.linspace(0, 1, 61, dtype=torch.float64)
    a, b = (grid.flatten()[:, None] for grid in torch.meshgrid(steps, steps, indexing="ij"))
    points = corners[0, 0] + a * (1 - b) * (corners[0, 1] - corners[0, 0]) + a * b * (corners[0, 2] - corners[0, 0])
    inner = points[((points - points.round()).abs() > 1e-9).all(1) & (points > 0).all(1) & (points < 8).all(1)].long()
    assert found[inner[:, 1], inner[:, 0]].all()
    row, column = torch.from_numpy(found).nonzero().T
    centers = torch.stack((column, row), dim=1) + 0.5
    shares = atlas.nearest_shares(corners.expand(len(centers), -1, -1), centers.double())
    away = (torch.einsum("tk,kc->tc", shares, corners[0]) - centers).abs().amax(1)
    # The square of the texel reaches the triangle, so the nearest point is within its half diagonal.
    assert bool((away <= 0.5 * 2**0.5 + 1e-9).all())


def test_shares_find_the_point_again():
    corners = torch.tensor([[[0.0, 0], [4, 0], [0, 4]], [[0, 0], [0, 4], [4, 0]]], dtype=torch.float64)
    points = torch.tensor([[1.0, 2], [1, 2]], dtype=torch.float64)
    assert atlas.nearest_shares(corners, points).tolist() == [[0.25, 0.25, 0.5], [0.25, 0.5, 0.25]]


@pytest.mark.parametrize(
    ("corners", "point", "expected"),
    [
        ([[0, 0], [4, 0], [0, 4]], [1, -1], [0.75, 0.25, 0]),  # below a side
        ([[0, 0], [4, 0], [0, 4]], [-1, -2], [1, 0, 0]),  # at a corner
        ([[0, 0], [4, 0], [0, 4]], [3, 3], [0, 0.5, 0.5]),
        ([[0, 0], [10, 0], [5, 0.01]], [2, 0.5], [0.6, 0, 0.4]),  # beside a sliver
        ([[0, 0], [4, 0], [2, 0]], [1, 1], [0.75, 0.25, 0]),  # without an area
        ([[1, 1], [1, 1], [1, 1]], [1, 1], None),  # without a length
    ],
)
def test_outside_of_a_triangle_the_nearest_point_counts(corners, point, expected):
    triangle, place = (torch.tensor([values], dtype=torch.float64) for values in (corners, point))
    [shares] = atlas.nearest_shares(triangle, place).tolist()
    assert sum(shares) == pytest.approx(1) and min(shares) >= 0
    if expected is not None:
        nearest = torch.einsum("k,kc->c", torch.tensor(expected, dtype=torch.float64), triangle[0])
        found = torch.einsum("k,kc->c", torch.tensor(shares, dtype=torch.float64), triangle[0])
        assert found.tolist() == pytest.approx(nearest.tolist(), abs=2e-3)


def test_a_triangle_that_covers_no_centre_has_its_colour_in_the_texels_that_it_touches():
    """Its neighbours in the picture would lend it theirs otherwise."""
    coordinates = torch.tensor([[0.0, 0], [0.5, 0], [0, 1], [0.7, 0.51], [0.9, 0.52], [0.7, 0.53]])
    faces = torch.tensor([[0, 1, 2], [3, 4, 5]])
    vertices = torch.tensor([[0.0, 0, 0]] * 3 + [[1.0, 1, 1]] * 3)
    picture = atlas.bake(lambda points: points * torch.tensor([1.0, 0.5, 0]), vertices, faces, coordinates, 16)
    assert picture[8, 11:14].tolist() == [[255, 128, 0]] * 3 and picture[1, 1].tolist() == [0, 0, 0]


def test_a_baked_texel_has_the_colour_of_the_world_point_under_it(box):
    vertices, faces, coordinates, edge = box
    picture = atlas.bake(by_place, vertices, faces, coordinates, edge).numpy()
    shares = shares_everywhere(coordinates[faces].double().numpy() * edge, edge)
    triangle, row, column = (shares > 1e-6).all(-1).nonzero()
    points = (shares[triangle, row, column][..., None] * vertices.numpy()[faces.numpy()][triangle]).sum(1)
    assert numpy.abs(picture[row, column] / 255 - (points / 2 + 0.5)).max() < 0.5 / 255 + 1e-5


def test_colours_are_asked_for_in_parts_and_in_the_cube_only(box, monkeypatch):
    monkeypatch.setattr(atlas, "POINTS_AT_ONCE", 500)
    asked = []

    def color(points):
        asked.append(points)
        return by_place(points)

    parts = atlas.bake(color, *box)
    assert max(map(len, asked)) == 500 and len(asked) > 3
    assert float(torch.cat(asked).abs().max()) <= 0.5 + 1e-6
    monkeypatch.undo()
    assert torch.equal(parts, atlas.bake(by_place, *box))


def test_a_surface_of_one_colour_has_that_colour_in_every_texel(box):
    """So no level of a mipmap, and no filter, mixes in another one."""
    color = torch.tensor([51.0, 102, 204]) / 255
    picture = atlas.bake(lambda points: color.expand_as(points), *box)
    assert picture.flatten(0, 1).unique(dim=0).tolist() == [[51, 102, 204]]


def test_the_first_rings_around_a_chart_are_the_mean_of_their_neighbours():
    picture, covered = torch.zeros(16, 16, 3), torch.zeros(16, 16, dtype=torch.bool)
    picture[8, 8], picture[8, 9] = torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0])
    covered[8, 8:10] = True
    filled = atlas.continued(picture, covered)
    assert filled[8, 8].tolist() == [1, 0, 0] and filled[8, 9].tolist() == [0, 1, 0]
    assert filled[7, 7].tolist() == [1, 0, 0] and filled[9, 10].tolist() == [0, 1, 0]
    assert filled[7, 8].tolist() == pytest.approx([0.5, 0.5, 0])
    assert bool(((filled[..., 0] + filled[..., 1] - 1).abs() < 1e-5).all()) and not filled[..., 2].any()


@pytest.mark.parametrize("edge", [1, 2, 7, 64, 100])
def test_every_texel_gets_a_colour_for_any_size(edge):
    picture, covered = torch.zeros(edge, edge, 3), torch.zeros(edge, edge, dtype=torch.bool)
    assert torch.equal(atlas.continued(picture, covered), torch.ones(edge, edge, 3))
    covered[edge // 2, edge // 2] = True
    picture[covered] = 0.25
    assert atlas.continued(picture, covered).flatten().tolist() == pytest.approx([0.25] * 3 * edge**2)


def test_without_xatlas_it_says_how_to_get_it_or_to_do_without(monkeypatch):
    monkeypatch.setitem(sys.modules, "xatlas", None)
    with pytest.raises(BackendError, match=r"distvsd\[export\].*--texture 0"):
        atlas.unwrap(*cube(), 64)
