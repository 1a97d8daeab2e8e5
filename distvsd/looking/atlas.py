"""Textures of surfaces: charts laid out by xatlas, colours read at the world point of every texel, padding around.

Texture coordinates: u to the right and v downward, in [0, 1]; texel (row r, column c) of E has its centre at
((c + 0.5) / E, (r + 0.5) / E). Everything is batched over texels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distvsd.errors import BackendError

GAP = 8  # texels between charts; about 5 are left where the atlas, made smaller, fits into the picture
PADDING = 3  # texels around a chart that continue its colours at full resolution
POINTS_AT_ONCE = 1 << 18  # whose colours are read in one call


def unwrap(vertices: Tensor, faces: Tensor, edge: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lays a surface out flat for a square picture of `edge` texels.

    Gives the vertex that each new vertex is a copy of `[K]`, the faces among the new ones `[M, 3]` in the order of
    `faces`, and texture coordinates `[K, 2]` float32. Raises BackendError where xatlas is not installed.
    """
    try:
        import xatlas
    except ImportError as error:
        raise BackendError(
            f"textures need xatlas ({error}); pip install 'distvsd[export]', or export colours of vertices with "
            "--texture 0"
        ) from error
    charts, layout = xatlas.ChartOptions(), xatlas.PackOptions()
    # An isosurface has no straight edges to follow. Without the search for them charts are a third fewer.
    charts.straightness_weight, charts.roundness_weight = 0.0, 0.0
    layout.resolution, layout.padding, layout.bilinear = edge, GAP, True
    atlas = xatlas.Atlas()
    atlas.add_mesh(vertices.float().contiguous().numpy(), faces.int().contiguous().numpy().view("uint32"))
    atlas.generate(charts, layout)
    source, new_faces, coordinates = atlas.get_mesh(0)
    # The atlas is only about as large as asked for, and need not be square; coordinates come relative to its edges.
    share = torch.tensor([atlas.width, atlas.height], dtype=torch.float64) / max(atlas.width, atlas.height)
    places = (torch.from_numpy(coordinates).double() * share).clamp(0, 1).float()
    return torch.from_numpy(source.view("int32")).long(), torch.from_numpy(new_faces.view("int32")).long(), places


def bake(color: Callable[[Tensor], Tensor], vertices: Tensor, faces: Tensor, coordinates: Tensor, edge: int) -> Tensor:
    """The picture `[E, E, 3]` uint8 of a surface that is laid out at texture `coordinates` `[N, 2]`.

    color: colours `[K, 3]` in [0, 1] of world points `[K, 3]`. A texel whose centre a triangle covers has the colour of
    the world point that is there. One that a triangle only touches has the colour of the point of the triangle that is
    nearest to its centre, so that no triangle is too thin for a colour. The others continue the charts, see
    `continued`. White where nothing is touched.
    """
    corners_M32 = coordinates[faces].double() * edge
    centers_EE = texel_owners(corners_M32, edge)
    owners_EE = torch.where(centers_EE >= 0, centers_EE, texel_owners(corners_M32, edge, reach=0.5))
    touched = (owners_EE.flatten() >= 0).nonzero()[:, 0]
    picture_T3 = torch.zeros(edge * edge, 3)
    for texels in touched.split(POINTS_AT_ONCE):
        triangles = owners_EE.flatten()[texels]
        center_T2 = torch.stack((texels % edge, texels // edge), dim=-1) + 0.5
        shares_T3 = nearest_shares(corners_M32[triangles], center_T2.double())
        points_T3 = torch.einsum("tk,tkc->tc", shares_T3, vertices[faces[triangles]].double())
        picture_T3[texels] = color(points_T3.float()).float().cpu()
    filled_EE3 = continued(picture_T3.reshape(edge, edge, 3), owners_EE >= 0)
    return (filled_EE3.clamp(0, 1) * 255).round().byte()


def texel_owners(corners_M32: Tensor, edge: int, reach: float = 0.0) -> Tensor:
    """The triangle at each texel `[E, E]` int64, -1 where there is none; the last one of several.

    corners: of triangles in texels, `[M, 3, 2]` (column, row) float64. A triangle is at a texel where it meets the
    square of half-width `reach` around its centre: 0 for the centre itself, 0.5 for all of the texel. A row of texels
    at a time, all at once: work and memory are those of the texels that are found.
    """
    rows_M3 = corners_M32[..., 1]
    triangle_L, row_L = _spans(rows_M3.amin(1) - reach, rows_M3.amax(1) + reach, edge)
    start_L32, end_L32 = corners_M32[triangle_L], corners_M32[triangle_L].roll(-1, dims=1)
    from_L3, height_L3 = start_L32[..., 1], end_L32[..., 1] - start_L32[..., 1]
    middle_L1 = row_L[:, None] + 0.5
    low_L3, high_L3 = torch.minimum(from_L3, end_L32[..., 1]), torch.maximum(from_L3, end_L32[..., 1])
    meets_L3 = (low_L3 <= middle_L1 + reach) & (high_L3 >= middle_L1 - reach)
    # Both ends of the part of each side that is within the row's height; of a level side, its own ends.
    columns = []
    for level, own in ((-reach, 0.0), (reach, 1.0)):
        along_L3 = (middle_L1 + level - from_L3) / torch.where(height_L3 == 0, 1.0, height_L3)
        along_L3 = torch.where(height_L3 == 0, own, along_L3.clamp(0, 1))
        columns.append(start_L32[..., 0] + along_L3 * (end_L32[..., 0] - start_L32[..., 0]))
    left_L = torch.where(meets_L3, torch.minimum(*columns), torch.inf).amin(1)
    right_L = torch.where(meets_L3, torch.maximum(*columns), -torch.inf).amax(1)
    line_T, column_T = _spans(left_L - reach, right_L + reach, edge)
    texel_T = row_L[line_T] * edge + column_T
    owners = torch.full((edge * edge,), -1, dtype=torch.int64)
    return owners.scatter_reduce_(0, texel_T, triangle_L[line_T], "amax").reshape(edge, edge)


def _spans(low_N: Tensor, high_N: Tensor, edge: int) -> tuple[Tensor, Tensor]:
    """Every whole number k in [0, edge) with low <= k + 0.5 <= high: of which row of `low` it is, and k."""
    empty = ~(low_N <= high_N)
    first = torch.where(empty, 0, low_N - 0.5).ceil().clamp(0, edge).long()
    last = torch.where(empty, -1, high_N - 0.5).floor().clamp(-1, edge - 1).long()
    counts = (last - first + 1).clamp_min(0)
    row = torch.arange(len(low_N)).repeat_interleave(counts)
    begins = counts.cumsum(0) - counts
    return row, torch.arange(len(row)) - begins[row] + first[row]


def nearest_shares(corners_T32: Tensor, points_T2: Tensor) -> Tensor:
    """Barycentric shares `[T, 3]`, with the sum 1 and none below 0, of the points of triangles that are nearest to
    given points."""
    start, side = corners_T32.roll(-1, dims=1), corners_T32.roll(-2, dims=1) - corners_T32.roll(-1, dims=1)
    toward = points_T2[:, None] - start  # row k: of the side opposite to corner k
    areas = side[..., 0] * toward[..., 1] - side[..., 1] * toward[..., 0]
    total = areas.sum(1, keepdim=True)
    inside = (areas * total >= 0).all(1, keepdim=True) & (total != 0)
    along = ((toward * side).sum(-1) / side.square().sum(-1).clamp_min(1e-300)).clamp(0, 1)
    nearest = (toward - along[..., None] * side).square().sum(-1).argmin(1, keepdim=True)
    along = along.gather(1, nearest)
    on_side = torch.zeros_like(areas).scatter(1, (nearest + 1) % 3, 1 - along).scatter(1, (nearest + 2) % 3, along)
    return torch.where(inside, areas / torch.where(total == 0, 1.0, total), on_side)


def continued(picture_EE3: Tensor, covered_EE: Tensor) -> Tensor:
    """The picture with colours in every texel: covered ones keep theirs.

    The first PADDING texels around a chart take the mean of their neighbours that have a colour, ring after ring: they
    are what bilinear filtering reads. The others take the mean of the smallest block of 2, 4, 8, ... texels that has
    one, so that no level of a mipmap mixes in a background. White where nothing is covered.
    """
    color = picture_EE3.permute(2, 0, 1)[None] * covered_EE
    known = covered_EE[None, None].to(color.dtype)
    for _ in range(PADDING):
        color, known = _ring(color, known)
    return _coarse_to_fine(color, known)[0].permute(1, 2, 0)


def _ring(color: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """One texel more around what is known; both `[1, C, E, E]`, colours 0 where unknown."""
    around = 9 * torch.nn.functional.avg_pool2d(torch.cat((color, known), dim=1), 3, stride=1, padding=1)
    count = around[:, -1:]
    new = (known == 0) & (count > 0.5)
    return torch.where(new, around[:, :-1] / count.clamp_min(1), color), torch.where(new, 1.0, known)


def _coarse_to_fine(color: Tensor, known: Tensor) -> Tensor:
    """Unknown texels from the next coarser level, whose texels are the means of the known ones of 2 by 2."""
    if color.shape[-1] == 1:
        return torch.where(known > 0, color, 1.0)
    pooled = torch.nn.functional.avg_pool2d(torch.cat((color, known), dim=1), 2, ceil_mode=True)
    count = pooled[:, -1:]
    coarse = _coarse_to_fine(
        torch.where(count > 0, pooled[:, :-1] / count.clamp_min(1e-6), 0.0), (count > 0).to(color.dtype)
    )
    finer = coarse.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)[..., : color.shape[2], : color.shape[3]]
    return torch.where(known > 0, color, finer)
