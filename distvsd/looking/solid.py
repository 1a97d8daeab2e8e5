"""A particle's surface as it goes into a file: triangles, normals, and colours at vertices or in a texture.

World units and axes: right-handed, z up, the front (azimuth 0) toward +x. Writers turn what a file wants otherwise.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from distvsd.looking.atlas import POINTS_AT_ONCE, bake, unwrap
from distvsd.render.meshes import Meshes, Surface


@dataclass(frozen=True)
class Texture:
    """coordinates `[N, 2]` float32 in [0, 1], u to the right and v downward from the upper left corner of the picture.

    pixels: `[E, E, 3]` uint8, sRGB, row 0 at the top.
    """

    coordinates: Tensor
    pixels: Tensor

    @cached_property
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


class NotFiniteError(ValueError):
    """A surface with numbers that are not finite."""


def solid_of(surface: Surface, texture: int, name: str, facts: Mapping[str, Any]) -> Solid | None:
    """The surface of one particle with its colours baked; None where it has no triangle with an area.

    texture: edge of the picture, 0 for colours of the vertices. Colours are read in parts, on the surface's device.
    Raises NotFiniteError where a vertex or a colour is not finite, BackendError where a texture needs xatlas and there
    is none.
    """
    vertices, faces = cleaned(*(part.detach().cpu() for part in surface.meshes.one(0)))
    if not len(faces):
        return None
    device = surface.meshes.vertices.device

    @torch.no_grad()
    def color(points_K3: Tensor) -> Tensor:
        parts = [surface.color(part[None].to(device))[0].float().cpu() for part in points_K3.split(POINTS_AT_ONCE)]
        found_K3 = torch.cat(parts)
        if not bool(found_K3.isfinite().all()):
            raise NotFiniteError("colours of its surface are not finite")
        return found_K3.clamp(0, 1)

    normals = vertex_normals(vertices, faces)
    if texture == 0:
        return Solid(name, vertices, faces, normals, color(vertices), facts)
    source, faces, coordinates = unwrap(vertices, faces, texture)
    pixels = bake(color, vertices[source], faces, coordinates, texture)
    return Solid(name, vertices[source], faces, normals[source], Texture(coordinates, pixels), facts)


def cleaned(vertices: Tensor, faces: Tensor) -> tuple[Tensor, Tensor]:
    """The triangles with an area, and the vertices `[N, 3]` float32 that they use, both in the order they had.

    Raises NotFiniteError where a vertex that is used is not finite.
    """
    if not bool(vertices[faces].isfinite().all()):
        raise NotFiniteError("vertices of its surface are not finite")
    vertices = vertices.float()
    faces = faces[_meshes(vertices, faces).area_normals.norm(dim=-1) > 0]
    used, faces_of_used = faces.unique(return_inverse=True)
    return vertices[used], faces_of_used


def vertex_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Unit normals `[N, 3]` float32: the mean of the triangles at each vertex by their area; +z where they cancel."""
    normals_N3 = _meshes(vertices, faces).vertex_normals
    # Shorter than 1 where the triangles have nearly no area, which a reader of glTF takes for an error.
    length_N1 = normals_N3.norm(dim=-1, keepdim=True)
    upward = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    return torch.where(length_N1 > 0.5, normals_N3 / length_N1, upward).float()


def y_up(vectors: Tensor) -> Tensor:
    """World vectors `[..., 3]` in the axes of glTF: y up, the front toward +z. (x, y, z) becomes (y, z, x), which is a
    rotation."""
    return vectors[..., [1, 2, 0]]


def _meshes(vertices: Tensor, faces: Tensor) -> Meshes:
    return Meshes.of([(vertices.double(), faces)])
