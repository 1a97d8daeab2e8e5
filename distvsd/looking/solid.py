"""A particle's surface as it goes into a file: triangles, normals, and colours at vertices or in a texture.

World units and axes: right-handed, z up, the front (azimuth 0) toward +x. What a file wants otherwise, its writer turns.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Texture:
    """coordinates `[N, 2]` float32 in [0, 1], u to the right and v downward from the upper left corner of the picture.

    pixels: `[E, E, 3]` uint8, sRGB, row 0 at the top.
    """

    coordinates: Tensor
    pixels: Tensor

    def png(self) -> bytes:
        """The picture as a PNG file."""
        from PIL import Image

        stream = io.BytesIO()
        Image.fromarray(self.pixels.contiguous().numpy()).save(stream, format="PNG")
        return stream.getvalue()


@dataclass(frozen=True)
class Solid:
    """vertices `[N, 3]` and unit normals `[N, 3]` float32, faces `[M, 3]` int64, counter-clockwise from outside; CPU.

    paint: a texture, or sRGB colours of the vertices `[N, 3]` float32 in [0, 1]. facts: what the file says of the
    particle beside its shape, as plain values.
    """

    name: str
    vertices: Tensor
    faces: Tensor
    normals: Tensor
    paint: Texture | Tensor
    facts: Mapping[str, Any] = field(default_factory=dict)


def cleaned(vertices: Tensor, faces: Tensor) -> tuple[Tensor, Tensor]:
    """The triangles with an area, and the vertices that they use, both in the order they had."""
    corners_M33 = vertices.double()[faces]
    faces = faces[_crossed(corners_M33).norm(dim=-1) > 0]
    used, faces_of_used = faces.unique(return_inverse=True)
    return vertices[used], faces_of_used


def vertex_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Unit normals `[N, 3]` float32: the mean of the triangles at each vertex by their area; +z where they cancel."""
    areas_M3 = _crossed(vertices.double()[faces])
    sums_N3 = torch.zeros(len(vertices), 3, dtype=torch.float64)
    sums_N3.index_add_(0, faces.flatten(), areas_M3.repeat_interleave(3, dim=0))
    length_N1 = sums_N3.norm(dim=-1, keepdim=True)
    upward = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    return torch.where(length_N1 > 1e-30, sums_N3 / length_N1.clamp_min(1e-30), upward).float()


def y_up(vectors: Tensor) -> Tensor:
    """World vectors `[..., 3]` in the axes of glTF: y up, the front toward +z. (x, y, z) becomes (y, z, x), which is a
    rotation."""
    return vectors[..., [1, 2, 0]]


def _crossed(corners_M33: Tensor) -> Tensor:
    """Twice the area of triangles, along their normals: `[M, 3]`."""
    return torch.linalg.cross(corners_M33[:, 1] - corners_M33[:, 0], corners_M33[:, 2] - corners_M33[:, 0])
