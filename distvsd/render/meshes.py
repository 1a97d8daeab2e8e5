"""Triangle meshes of several particles, end to end in one set of tensors, and what is computed on them.

Meshes of particles differ in size. Concatenated they are drawn, smoothed and measured in one call, without padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

_SMALLEST = 1e-12  # area, square world units, far below that of any face that can be seen


@dataclass(frozen=True)
class Meshes:
    """Meshes of P particles.

    vertices: `[N, 3]` world units. faces: `[M, 3]` int64, indices into all vertices; counter-clockwise seen from
    outside. vertex_ends, face_ends: P numbers each; particle p has the vertices from vertex_ends[p - 1] (or 0) to
    vertex_ends[p].
    """

    vertices: Tensor
    faces: Tensor
    vertex_ends: tuple[int, ...]
    face_ends: tuple[int, ...]

    @staticmethod
    def of(parts: list[tuple[Tensor, Tensor]]) -> Meshes:
        """From the vertices `[n, 3]` and faces `[m, 3]` of each particle; a particle's faces count its own vertices."""
        vertex_ends = torch.tensor([0] + [len(vertices) for vertices, _ in parts]).cumsum(0).tolist()
        face_ends = torch.tensor([0] + [len(faces) for _, faces in parts]).cumsum(0).tolist()
        return Meshes(
            torch.cat([vertices for vertices, _ in parts]),
            torch.cat([faces + start for (_, faces), start in zip(parts, vertex_ends, strict=False)]),
            tuple(vertex_ends[1:]),
            tuple(face_ends[1:]),
        )

    def __len__(self) -> int:
        return len(self.vertex_ends)

    def one(self, row: int) -> tuple[Tensor, Tensor]:
        """Vertices `[n, 3]` and faces `[m, 3]` of one particle; the faces count its own vertices."""
        first, last = list(pairwise((0, *self.vertex_ends)))[row]
        first_face, last_face = list(pairwise((0, *self.face_ends)))[row]
        return self.vertices[first:last], self.faces[first_face:last_face] - first

    @cached_property
    def vertex_owners(self) -> Tensor:
        """`[N]` int64: the row of the particle that a vertex belongs to."""
        return _owners(self.vertex_ends, self.vertices.device)

    @cached_property
    def face_owners(self) -> Tensor:
        """`[M]` int64: the row of the particle that a face belongs to."""
        return _owners(self.face_ends, self.faces.device)

    @cached_property
    def corners(self) -> Tensor:
        """`[M, 3, 3]`: the vertices of each face; differentiable."""
        return self.vertices[self.faces]

    @cached_property
    def area_normals(self) -> Tensor:
        """`[M, 3]`: outward normals of the faces, as long as twice their area; differentiable."""
        a, b, c = self.corners.unbind(1)
        normals: Tensor = torch.linalg.cross(b - a, c - a)
        return normals

    @cached_property
    def vertex_normals(self) -> Tensor:
        """`[N, 3]`: unit normals of the vertices, averaged over their faces by area; differentiable."""
        total = torch.zeros_like(self.vertices)
        for corner in range(3):
            total = total.index_add(0, self.faces[:, corner], self.area_normals)
        return total / _length(total)[:, None]

    @cached_property
    def edges(self) -> Edges:
        """The edges, each once."""
        return _edges(self.faces, len(self.vertices))


@dataclass(frozen=True)
class Edges:
    """vertices: `[E, 2]` int64. faces: `[E, 2]` int64, two of the faces that share the edge; equal where it has one.
    is_inner: `[E]`, whether exactly two faces share it."""

    vertices: Tensor
    faces: Tensor
    is_inner: Tensor


@dataclass(frozen=True)
class Surface:
    """What particles look like from outside. color: world points `[P, N, 3]` to RGB `[P, N, 3]` in [0, 1], row i of
    particle i; differentiable."""

    meshes: Meshes
    color: Callable[[Tensor], Tensor]


def normal_consistency(meshes: Meshes) -> Tensor:
    """Mean of 1 - cos of the angle between neighbouring faces, `[P]`, weighted by the product of their areas; 0 for a
    mesh without inner edges. Differentiable.

    Without the weights, faces of nearly no area, of which marching tetrahedra make many, would have the largest
    gradients.
    """
    pairs, normals = meshes.edges.faces[meshes.edges.is_inner], meshes.area_normals
    first, second = normals[pairs[:, 0]], normals[pairs[:, 1]]
    areas = _length(first) * _length(second)
    owners = meshes.face_owners[pairs[:, 0]]
    empty = areas.new_zeros(len(meshes))
    bend = empty.index_add(0, owners, areas - (first * second).sum(1))
    return bend / empty.index_add(0, owners, areas).clamp_min(_SMALLEST)


def laplacian(meshes: Meshes) -> Tensor:
    """Mean length of the sum of the edges that leave a vertex, `[P]`, world units: 0 where every vertex is in the
    middle of its neighbours. Differentiable. The uniform Laplacian of the paper's code, not divided by the neighbours'
    number.
    """
    a, b = meshes.edges.vertices.unbind(1)
    edges = meshes.vertices[b] - meshes.vertices[a]
    away = torch.zeros_like(meshes.vertices).index_add(0, a, edges).index_add(0, b, -edges)
    sums = away.new_zeros(len(meshes)).index_add(0, meshes.vertex_owners, _length(away))
    return sums / torch.bincount(meshes.vertex_owners, minlength=len(meshes)).clamp_min(1)


def _owners(ends: tuple[int, ...], device: torch.device) -> Tensor:
    counts = torch.tensor([last - first for first, last in pairwise((0, *ends))], device=device)
    return torch.repeat_interleave(torch.arange(len(ends), device=device), counts, output_size=ends[-1] if ends else 0)


def _length(vectors: Tensor) -> Tensor:
    """With a gradient of 0, and not of NaN, where it is 0."""
    return (vectors.square().sum(-1) + _SMALLEST**2).sqrt()


def _edges(faces: Tensor, vertices: int) -> Edges:
    ends = torch.cat((faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]])).sort(1).values
    # One number an edge; sorted, the sides of faces that share an edge are adjacent.
    keys, order = (ends[:, 0] * vertices + ends[:, 1]).sort(stable=True)
    side_face = order % max(len(faces), 1)
    is_first = torch.ones_like(keys, dtype=torch.bool)
    is_first[1:] = keys[1:] != keys[:-1]
    first = is_first.nonzero().squeeze(1)
    after = torch.cat((first[1:], first.new_tensor([len(keys)]))) if len(first) else first
    count = after - first
    second = torch.where(count > 1, first + 1, first)
    return Edges(ends[order[first]], torch.stack((side_face[first], side_face[second]), dim=1), count == 2)
