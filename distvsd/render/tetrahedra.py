"""Meshes from signed values on a tetrahedral grid: the marching tetrahedra of DMTet (arXiv 2111.04276).

The grid is a body-centred cubic lattice: cube corners and cube centres. Its tetrahedra are all alike and close to
regular, so triangles are too, and no direction is preferred (Labelle and Shewchuk, Isosurface Stuffing, 2007).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distvsd.render.meshes import Meshes

_TET_EDGES = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


@dataclass(frozen=True)
class TetGrid:
    """A lattice in the cube [-1, 1]^3, on one device, shared by all particles.

    points: `[V, 3]` float32. edges: `[E, 2]`, each once. tets: `[T, 4]` int64, positively oriented. tet_edges: `[T,
    6]`, the rows of `edges` between the corners 01, 02, 03, 12, 13, 23. is_border: `[V]`, points that must stay
    outside of the mesh, so that it is closed. cell: edge of a cube.
    """

    points: Tensor
    edges: Tensor
    tets: Tensor
    tet_edges: Tensor
    is_border: Tensor
    cell: float


def number_of_points(resolution: int) -> int:
    """Of `tet_grid`."""
    return (resolution + 1) ** 3 + resolution**3


@functools.lru_cache(maxsize=4)
def tet_grid(resolution: int, device: torch.device) -> TetGrid:
    """The lattice with `resolution` cubes along an edge: 2 r^3 points and 12 r^3 tetrahedra, nearly. At least 3."""
    r = resolution
    corner = torch.arange((r + 1) ** 3).reshape(r + 1, r + 1, r + 1)
    centre = torch.arange(r**3).reshape(r, r, r) + (r + 1) ** 3
    tets = torch.cat([_around_faces(corner, centre, axis) for axis in range(3)])
    points = torch.cat((_lattice(r + 1, 0.0, r), _lattice(r, 0.5, r)))
    a, b, c, d = points[tets].unbind(1)
    flipped = torch.linalg.det(torch.stack((b - a, c - a, d - a), dim=1)) < 0
    tets[flipped] = tets[flipped][:, [0, 1, 3, 2]]
    pairs = torch.stack([tets[:, list(edge)] for edge in _TET_EDGES], dim=1).sort(-1).values
    keys, rows = torch.unique(pairs[..., 0] * len(points) + pairs[..., 1], return_inverse=True)
    edges = torch.stack((keys // len(points), keys % len(points)), dim=1)
    # The pyramids between the outermost centres and the sides of the cube are in no tetrahedron.
    is_border = points.abs().amax(1) > 1 - 1.5 / r
    return TetGrid(
        points=points.to(device),
        edges=edges.to(device),
        tets=tets.to(device),
        tet_edges=rows.reshape(-1, 6).to(device),
        is_border=is_border.to(device),
        cell=2 / r,
    )


def _lattice(count: int, offset: float, resolution: int) -> Tensor:
    axis = (torch.arange(count) + offset) * (2 / resolution) - 1
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1).reshape(-1, 3)


def _around_faces(corner: Tensor, centre: Tensor, axis: int) -> Tensor:
    """Four tetrahedra around each segment between the centres of neighbouring cubes; the other two corners are an edge
    of the square between these cubes."""
    corner, centre = corner.movedim(axis, 0)[1:-1], centre.movedim(axis, 0)
    square = (corner[:, :-1, :-1], corner[:, 1:, :-1], corner[:, 1:, 1:], corner[:, :-1, 1:])
    return torch.cat(
        [
            torch.stack((centre[:-1], centre[1:], square[side], square[(side + 1) % 4]), dim=-1).reshape(-1, 4)
            for side in range(4)
        ]
    )


def marching_tetrahedra(grid: TetGrid, values: Tensor, points: Tensor) -> Meshes:
    """The surface at which `values` `[P, V]`, positive inside, change their sign; batched over particles.

    points: `[P, V, 3]` or `[V, 3]`, where the points of the grid are. Vertices are where the value is 0 by linear
    interpolation along an edge: differentiable in values and points. Border points count as outside; so do those with
    a value that is NaN, and vertices on their edges are NaN. Closed and consistently oriented; empty where nothing is
    inside.
    """
    particles, edges = len(values), len(grid.edges)
    values = torch.where(grid.is_border, values.clamp(max=-1e-3 * grid.cell), values)
    # Bytes, with those of a point side by side: most of the lattice is far from every surface, and this is the only
    # look at all of it.
    inside = (values > 0).byte().T.contiguous()
    ends = [inside.index_select(0, grid.edges[:, end]) for end in range(2)]
    owner, edge = _by_particle(ends[0] != ends[1])
    a, b = grid.edges[edge].unbind(1)
    at_a, at_b = values[owner, a], values[owner, b]
    from_a, from_b = (points[a], points[b]) if points.ndim == 2 else (points[owner, a], points[owner, b])
    vertices = from_a + (from_b - from_a) * (at_a / (at_a - at_b))[:, None]

    case = inside.index_select(0, grid.tets[:, 0])
    for corner in range(1, 4):
        case |= inside.index_select(0, grid.tets[:, corner]) << corner
    of, tet = _by_particle((case > 0) & (case < 15))
    case = case[tet, of].long()
    table, triangles = _cases(values.device)
    vertex_of = torch.zeros(particles * edges, dtype=torch.int64, device=values.device)
    vertex_of[owner * edges + edge] = torch.arange(len(edge), device=values.device)
    found = vertex_of[(of * edges)[:, None] + grid.tet_edges[tet]]
    sides = table[case]
    is_face = torch.arange(2, device=values.device) < triangles[case, None]
    faces = found.gather(1, sides.flatten(1)).reshape(-1, 2, 3)[is_face]
    faces_of = of[:, None].expand(-1, 2)[is_face]
    return Meshes(vertices, faces, _ends(owner, particles), _ends(faces_of, particles))


def _by_particle(found: Tensor) -> tuple[Tensor, Tensor]:
    """Column and row of every true entry of `[N, P]`, column by column."""
    rows = found.any(1).nonzero().squeeze(1)
    column, place = found[rows].T.nonzero(as_tuple=True)
    return column, rows[place]


def _ends(owners: Tensor, particles: int) -> tuple[int, ...]:
    return tuple(torch.bincount(owners, minlength=particles).cumsum(0).tolist())


@functools.lru_cache(maxsize=4)
def _cases(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each of 16 cases, bit i for corner i inside: up to two triangles `[16, 2, 3]` of crossed edges, turned so
    that they face outwards, and their number `[16]`."""
    corners = torch.cat((torch.zeros(1, 3), torch.eye(3)))
    middles = torch.stack([(corners[a] + corners[b]) / 2 for a, b in _TET_EDGES])
    table, count = torch.zeros(16, 2, 3, dtype=torch.int64), torch.zeros(16, dtype=torch.int64)
    for case in range(1, 15):
        inside = [corner for corner in range(4) if case >> corner & 1]
        outside = [corner for corner in range(4) if not case >> corner & 1]
        # Around the polygon, neighbouring edges share a corner.
        ring = [(i, o) for i in inside for o in outside]
        if len(inside) == 2:
            ring = [ring[0], ring[1], ring[3], ring[2]]
        polygon = [_TET_EDGES.index((min(i, o), max(i, o))) for i, o in ring]
        p, q, r = middles[polygon[:3]]
        outwards = corners[outside].mean(0) - corners[inside].mean(0)
        if torch.linalg.cross(q - p, r - p) @ outwards < 0:
            polygon.reverse()
        fan = [(polygon[0], polygon[k], polygon[k + 1]) for k in range(1, len(polygon) - 1)]
        count[case] = len(fan)
        table[case, : len(fan)] = torch.tensor(fan)
    return table.to(device), count.to(device)


def level_values(grid: TetGrid, density: Tensor, threshold: float, halvings: int = 6) -> Tensor:
    """Values `[P, V]` whose sign changes where the density `[P, V]` is at the threshold: log(density / threshold).

    Where no density of a particle reaches the threshold, it is halved for this particle until one does, at most
    `halvings` times. A particle whose density is lower still has no positive value, so its surface is empty.
    """
    density = torch.where(grid.is_border, torch.zeros_like(density), density)
    most = density.amax(1, keepdim=True)
    lower = torch.ceil(torch.log2(threshold / most.clamp_min(1e-30)) + 1e-6).clamp(0, halvings)
    lower = torch.where(most > threshold, torch.zeros_like(lower), lower)
    return torch.log(density.clamp_min(1e-30)) - (math.log(threshold) - math.log(2) * lower)
