"""What pixels see of meshes, differentiable in the vertices: positions, normals, and edges between surfaces.

Which face a pixel sees (`render/raster.py`) has no gradient. Where on the face its ray arrives has one, and so has
where an outline passes between two pixel centres, by which `antialias` mixes their colours (Laine et al., Modular
Primitives for High-Performance Differentiable Rendering, arXiv 2011.03277, Section 3.4).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from distvsd.cameras import Cameras
from distvsd.render.meshes import Meshes
from distvsd.render.raster import NEAR, Fragments, in_camera, to_pixels


@dataclass(frozen=True)
class Hits:
    """The K pixels that see a face, in the order of the flattened `[P, V, H, W]`.

    pixel: `[K]` int64, flat index. face: `[K]` int64. shares: `[K, 3]`, barycentric coordinates of the point that is
    seen, perspective included. depth: `[K]`, along the camera's axis, world units. Both are differentiable in the
    vertices.
    """

    meshes: Meshes
    fragments: Fragments
    pixel: Tensor
    face: Tensor
    shares: Tensor
    depth: Tensor

    @staticmethod
    def of(meshes: Meshes, fragments: Fragments, cameras: Cameras) -> Hits:
        resolution = fragments.face.shape[-1]
        pixel = fragments.hit.flatten().nonzero().squeeze(1)
        face = fragments.face.flatten()[pixel]
        image, place = pixel // resolution**2, pixel % resolution**2
        views = cameras.flatten()
        half = torch.tan(views.fovy / 2)[image]
        x = ((place % resolution + 0.5) * (2 / resolution) - 1) * half
        y = (1 - (place // resolution + 0.5) * (2 / resolution)) * half
        ray = torch.stack((x, y, -torch.ones_like(x)), dim=-1)
        frame = views.extrinsics[image]
        seen = torch.einsum("kcj,kji->kci", meshes.corners[face] - frame[:, None, :3, 3], frame[:, :3, :3])
        a, b, c = seen.unbind(1)
        first = torch.linalg.cross(b, c)
        sides = torch.stack((first, torch.linalg.cross(c, a), torch.linalg.cross(a, b)), dim=1)
        shares = (sides * ray[:, None]).sum(-1)
        total = shares.sum(1)
        return Hits(meshes, fragments, pixel, face, shares / total[:, None], (a * first).sum(-1) / total)

    def interpolate(self, of_vertices: Tensor) -> Tensor:
        """Values `[N, C]` of the vertices at the points that are seen: `[K, C]`. Differentiable in values and
        vertices."""
        return (of_vertices[self.meshes.faces[self.face]] * self.shares[..., None]).sum(1)

    @cached_property
    def positions(self) -> Tensor:
        """`[K, 3]`, world."""
        return self.interpolate(self.meshes.vertices)

    @cached_property
    def normals(self) -> Tensor:
        """`[K, 3]`: unit normals, smooth over the mesh, world."""
        # The eps bounds the gradient where normals of opposite directions cancel.
        return torch.nn.functional.normalize(self.interpolate(self.meshes.vertex_normals), dim=-1, eps=1e-3)

    def onto(self, background: Tensor, values: Tensor) -> Tensor:
        """The background `[P, V, H, W, C]` with values `[K, C]` at the pixels that see a face. Differentiable in
        both."""
        flat = background.reshape(-1, background.shape[-1])
        return flat.index_put((self.pixel,), values).reshape(background.shape)

    def by_particle(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Values `[K, C]` with one row a particle, padded with zeros to `[P, most, C]`, and the place `[K]` of each in
        the flattened rows."""
        particles = len(self.meshes)
        owner = self.meshes.face_owners[self.face]
        counts = torch.bincount(owner, minlength=particles)
        most = int(counts.max()) if len(owner) else 0
        # Pixels are in the order of the particles.
        place = owner * most + torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner]
        rows = values.new_zeros(particles * most, values.shape[-1]).index_put((place,), values)
        return rows.reshape(particles, most, values.shape[-1]), place


def antialias(images: Tensor, hits: Hits, cameras: Cameras) -> Tensor:
    """Images `[P, V, H, W, C]` with the colours of neighbouring pixels mixed where an outline passes between them.

    An outline is an edge of the mesh between a face that is turned to the camera and one that is not, or an edge of one
    face. Where it passes at distance d from the centre of the pixel on its own side, in pixels, the share of the other
    pixel's colour that is replaced, or of its own, is |d - 1/2|. The sum of the mixed opacity changes with a vertex as
    the covered area does. Differentiable in the images and in the vertices; at most one outline a pair of pixels, the
    nearest to the camera.
    """
    crossings = _crossings(hits, cameras, images.shape[3])
    flat = images.reshape(-1, images.shape[-1])
    own, other, distance = crossings.own, crossings.other, crossings.distance
    change = (distance - 0.5)[:, None] * (flat[own] - flat[other])
    to = torch.where(distance > 0.5, other, own)
    return flat.index_add(0, to, change).reshape(images.shape)


@dataclass(frozen=True)
class _Crossings:
    """J places where an outline passes between neighbouring pixels. own, other: `[J]`, flat indices of the pixel on the
    side of the surface and of that beyond; distance: `[J]` in [0, 1] pixels from the centre of the first."""

    own: Tensor
    other: Tensor
    distance: Tensor


def _crossings(hits: Hits, cameras: Cameras, resolution: int) -> _Crossings:
    ends, inwards, image = _outlines(hits.meshes, cameras, resolution)
    # An outline that is rather upright is crossed between pixels of a row, the others between those of a column. With
    # both, the corner that it cuts off would count twice.
    upright = (ends[:, 1, 1] - ends[:, 0, 1]).abs() >= (ends[:, 1, 0] - ends[:, 0, 0]).abs()
    found = []
    for along, chosen in ((1, upright), (0, ~upright)):
        rows = chosen.nonzero().squeeze(1)
        found.append(_on_lines(ends[rows], inwards[rows], image[rows], along, resolution))
    own, other, distance, depth = (torch.cat(parts) for parts in zip(*found, strict=True))
    depths = hits.depth.new_full((hits.fragments.face.numel(),), torch.inf)
    depths[hits.pixel] = hits.depth.detach()
    # What is nearer at the pixel beyond hides the edge; where the pixel on its own side sees nothing nearer than the
    # pixel beyond, the surface is thinner than a pixel and neither of them shows it.
    shown = (depths[other] > depth) & (depths[own] < depths[other])
    own, other, distance, depth = own[shown], other[shown], distance[shown], depth[shown]
    pair = torch.minimum(own, other) * 2 + ((own - other).abs() != 1)
    nearest = depths.new_full((2 * len(depths),), torch.inf).scatter_reduce(0, pair, depth, "amin")
    kept = (depth == nearest[pair]).nonzero().squeeze(1)
    # Two edges at the same depth meet in a vertex: the first is taken.
    order = torch.full_like(nearest, len(pair), dtype=torch.int64).scatter_reduce(0, pair[kept], kept, "amin")
    kept = kept[order[pair[kept]] == kept]
    return _Crossings(own[kept], other[kept], distance[kept])


def _outlines(meshes: Meshes, cameras: Cameras, resolution: int) -> tuple[Tensor, Tensor, Tensor]:
    """Outlines of all views: ends `[J, 2, 3]` in pixels and depth, whether the surface is on the left of them in the
    image `[J]`, and p V + v of the view `[J]`. Differentiable in the vertices."""
    edges, owners = meshes.edges, meshes.vertex_owners
    with torch.no_grad():
        seen = in_camera(meshes.vertices, owners, cameras)
        spots = to_pixels(seen, torch.tan(cameras.fovy / 2)[owners], resolution)
        a, b, c = seen[meshes.faces].unbind(1)
        is_front = (a * torch.linalg.cross(b, c)).sum(-1) < 0  # [M, V]
        outline = ~edges.is_inner[:, None] | (is_front[edges.faces[:, 0]] != is_front[edges.faces[:, 1]])
        reachable = -seen[..., 2] > NEAR
        outline &= reachable[edges.vertices].all(1) & spots[edges.vertices].isfinite().all(1).all(-1)
        edge, view = outline.nonzero(as_tuple=True)
        face = edges.faces[edge, 0]
        start, end = edges.vertices[edge].unbind(1)
        # The corner of the face that is not on the edge.
        third = meshes.faces[face].sum(1) - start - end
        side = _turn(spots[end, view] - spots[start, view], spots[third, view] - spots[start, view])
        image = owners[start] * cameras.shape[1] + view
    views = cameras.flatten()
    frame, half = views.extrinsics[image], torch.tan(views.fovy / 2)[image]
    points = meshes.vertices[torch.stack((start, end), dim=1)]
    seen = torch.einsum("jcx,jxy->jcy", points - frame[:, None, :3, 3], frame[:, :3, :3])
    spots = to_pixels(seen, half[:, None].expand(-1, 2), resolution)
    return torch.cat((spots, -seen[..., 2:]), dim=-1), side > 0, image


def _turn(first: Tensor, second: Tensor) -> Tensor:
    """Positive where `second` `[..., 2]` points to the left of `first`, with y upwards; in pixels y is downwards."""
    return first[..., 0] * second[..., 1] - first[..., 1] * second[..., 0]


def _on_lines(
    ends: Tensor, inwards: Tensor, image: Tensor, along: int, resolution: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where outlines cross the lines through pixel centres: of rows (along = 1) or of columns (along = 0).

    Returns the pixel on the side of the surface, that beyond, the distance from the centre of the first, and the depth
    (without a gradient), each `[J]`.
    """
    with torch.no_grad():
        low, high = ends[:, :, along].amin(1), ends[:, :, along].amax(1)
        first = torch.ceil(low.clamp(-1, resolution + 1) - 0.5).clamp_min(0).long()
        # A line through the upper end belongs to the next edge.
        beyond = torch.ceil(high.clamp(-1, resolution + 1) - 0.5).clamp_max(resolution).long()
        counts = (beyond - first).clamp_min(0)
        edge = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        line = first[edge] + torch.arange(len(edge), device=edge.device) - (counts.cumsum(0) - counts)[edge]
    start, end = ends[edge].unbind(1)
    share = (line + 0.5 - start[:, along]) / (end[:, along] - start[:, along])
    across = 1 - along
    spot = start[:, across] + share * (end[:, across] - start[:, across]) - 0.5
    with torch.no_grad():
        depth = 1 / ((1 - share) / start[:, 2] + share / end[:, 2])
        before = torch.floor(spot)
        inside = (before >= 0) & (before < resolution - 1)
        # Whether the surface is on the side of the smaller coordinate; see `_turn`.
        backwards = torch.zeros_like(start[:, :2])
        backwards[:, across] = -1
        is_before = (_turn(end[:, :2] - start[:, :2], backwards) > 0) == inwards[edge]
    kept = inside.nonzero().squeeze(1)
    before, line, is_before = before[kept].long(), line[kept], is_before[kept]
    row, column = (line, before) if along == 1 else (before, line)
    pixel = (image[edge[kept]] * resolution + row) * resolution + column
    step = 1 if along == 1 else resolution
    fraction = spot[kept] - before
    own = torch.where(is_before, pixel, pixel + step)
    other = torch.where(is_before, pixel + step, pixel)
    return own, other, torch.where(is_before, fraction, 1 - fraction), depth[kept]
