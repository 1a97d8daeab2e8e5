"""What is computed on triangle meshes, by hand on small ones."""

from __future__ import annotations

import math

import pytest
import torch

from distvsd.render.meshes import Meshes, laplacian, normal_consistency

TRIANGLE = (torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]]), torch.tensor([[0, 1, 2]]))
# Two triangles that share an edge of length 1 along x and meet at a right angle.
ROOF = (
    torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]),
    torch.tensor([[0, 1, 2], [1, 0, 3]]),
)
NOTHING = (torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64))


def test_one_particle_of_several_has_its_own_faces() -> None:
    meshes = Meshes.of([TRIANGLE, NOTHING, ROOF])
    assert (meshes.vertex_ends, meshes.face_ends) == ((3, 3, 7), (1, 1, 3))
    assert meshes.vertex_owners.tolist() == [0, 0, 0, 2, 2, 2, 2]
    assert meshes.face_owners.tolist() == [0, 2, 2]
    for row, (vertices, faces) in enumerate((TRIANGLE, NOTHING, ROOF)):
        assert torch.equal(meshes.one(row)[0], vertices)
        assert torch.equal(meshes.one(row)[1], faces)


def test_normals_point_to_where_faces_are_counter_clockwise() -> None:
    meshes = Meshes.of([TRIANGLE])
    assert meshes.area_normals.tolist() == [[0, 0, 1]]
    assert meshes.vertex_normals.tolist() == [[0, 0, 1]] * 3


def test_an_edge_is_counted_once_with_the_faces_that_share_it() -> None:
    edges = Meshes.of([ROOF]).edges
    assert edges.vertices.tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    assert edges.is_inner.tolist() == [True, False, False, False, False]
    assert sorted(edges.faces[0].tolist()) == [0, 1]


def test_an_edge_of_three_faces_is_not_an_inner_one() -> None:
    fan = torch.tensor([[0, 1, 2], [1, 0, 3], [0, 1, 4]])
    edges = Meshes.of([(torch.rand(5, 3), fan)]).edges
    assert edges.is_inner.tolist()[0] is False
    assert len(edges.vertices) == 7


def test_consistency_is_one_minus_the_cosine_between_neighbouring_faces() -> None:
    """A right angle: 1. A mesh without inner edges, or without faces: 0."""
    assert normal_consistency(Meshes.of([ROOF, TRIANGLE, NOTHING])).tolist() == pytest.approx([1, 0, 0], abs=1e-6)


def test_the_laplacian_is_the_mean_length_of_the_sum_of_the_edges_of_a_vertex() -> None:
    """Triangle: (1, 1), (-2, 1) and (1, -2)."""
    expected = (math.sqrt(2) + 2 * math.sqrt(5)) / 3
    assert laplacian(Meshes.of([NOTHING, TRIANGLE])).tolist() == pytest.approx([0, expected], abs=1e-6)


def test_flat_meshes_have_no_bend_and_their_gradients_are_finite() -> None:
    square = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], requires_grad=True)
    point = torch.zeros(3, 3)  # a face without an area
    faces = torch.tensor([[0, 1, 2], [0, 2, 3], [4, 5, 6]])
    meshes = Meshes(torch.cat((square, point)), faces, (7,), (3,))
    (normal_consistency(meshes) + laplacian(meshes) + meshes.vertex_normals.sum()).sum().backward()
    assert square.grad is not None
    assert square.grad.isfinite().all()
    assert normal_consistency(meshes).item() == pytest.approx(0, abs=1e-6)


def test_gradients_of_the_regularisers_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    vertices = torch.randn(6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    faces = torch.tensor([[0, 1, 2], [0, 2, 3], [0, 3, 4], [4, 5, 0], [1, 5, 2]])

    def total(vertices: torch.Tensor) -> torch.Tensor:
        meshes = Meshes(vertices, faces, (6,), (5,))
        return normal_consistency(meshes) + 0.3 * laplacian(meshes) + meshes.vertex_normals.square().sum(0).sum()

    assert torch.autograd.gradcheck(total, (vertices,), eps=1e-6, atol=1e-6)


def test_a_regular_tetrahedron_bends_by_its_dihedral_angle() -> None:
    corners = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    faces = torch.tensor([[0, 1, 2], [0, 3, 1], [0, 2, 3], [1, 3, 2]])
    # The dihedral angle has the cosine 1/3; the outward normals enclose its supplement.
    assert normal_consistency(Meshes.of([(corners, faces)])).item() == pytest.approx(1 + 1 / 3, abs=1e-6)
    assert math.isclose(laplacian(Meshes.of([(corners, faces)])).item(), 4 * math.sqrt(3), rel_tol=1e-5)
