"""Writes OBJ with its material, and PLY, from solids and splats.

OBJ has no axes of its own; most programs read it as y up, so it is turned as glTF is. PLY is read as it stands: it
keeps the world's axes, z up. Units are world units. Numbers in PLY are binary, little endian.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO

import torch
from torch import Tensor

from distvsd.looking.solid import Solid, Texture, y_up
from distvsd.render.splat import Splats

_SH_0 = 0.28209479177387814  # 1 / (2 sqrt(pi)), the constant spherical harmonic


def write_obj(stream: IO[bytes], solid: Solid, material_file: str) -> None:
    """An OBJ with texture coordinates and a material of the name of the solid, or, without a texture, colours behind
    the coordinates of a vertex ("v x y z r g b", an extension that is widely read).

    material_file: name of the MTL beside it; read only with a texture.
    """
    vertices = y_up(solid.vertices)
    lines = ["# distvsd; world units, y up, front +z", f"o {solid.name}"]
    if isinstance(solid.paint, Texture):
        # v counts from the bottom of the picture.
        coordinates = torch.stack((solid.paint.coordinates[:, 0], 1 - solid.paint.coordinates[:, 1]), dim=1)
        lines.insert(1, f"mtllib {material_file}")
        lines += [f"v {x:.7g} {y:.7g} {z:.7g}" for x, y, z in vertices.tolist()]
        lines += [f"vt {u:.7g} {v:.7g}" for u, v in coordinates.tolist()]
        lines += [_normal(row) for row in y_up(solid.normals).tolist()]
        lines += [f"usemtl {solid.name}"]
        lines += [f"f {a}/{a}/{a} {b}/{b}/{b} {c}/{c}/{c}" for a, b, c in (solid.faces + 1).tolist()]
    else:
        rows = torch.cat((vertices, solid.paint), dim=1).tolist()
        lines += [f"v {x:.7g} {y:.7g} {z:.7g} {r:.4f} {g:.4f} {b:.4f}" for x, y, z, r, g, b in rows]
        lines += [_normal(row) for row in y_up(solid.normals).tolist()]
        lines += [f"f {a}//{a} {b}//{b} {c}//{c}" for a, b, c in (solid.faces + 1).tolist()]
    stream.write(("\n".join(lines) + "\n").encode("ascii"))


def write_mtl(stream: IO[bytes], solid: Solid, picture_file: str) -> None:
    """The material of an OBJ: the texture, without shine. picture_file: name of the PNG beside it."""
    lines = [f"newmtl {solid.name}", "Ka 1 1 1", "Kd 1 1 1", "Ks 0 0 0", "illum 1", f"map_Kd {picture_file}"]
    stream.write(("\n".join(lines) + "\n").encode("ascii"))


def write_ply(stream: IO[bytes], solid: Solid) -> None:
    """Vertices with normals and 8-bit sRGB colours, and triangles. Raises ValueError for a solid with a texture."""
    if isinstance(solid.paint, Texture):
        raise ValueError("a PLY has colours at its vertices; make the solid without a texture")
    floats = ("x", "y", "z", "nx", "ny", "nz")
    header = [f"element vertex {len(solid.vertices)}", *(f"property float {name}" for name in floats)]
    header += [f"property uchar {name}" for name in ("red", "green", "blue")]
    header += [f"element face {len(solid.faces)}", "property list uchar int vertex_indices"]
    _begin_ply(stream, header)
    shapes = torch.cat((solid.vertices, solid.normals), dim=1).float()
    colors = (solid.paint.clamp(0, 1) * 255).round().byte()
    _write_rows(stream, _bytes(shapes), colors)
    _write_rows(stream, torch.full((len(solid.faces), 1), 3, dtype=torch.uint8), _bytes(solid.faces.int()))


def write_splats(stream: IO[bytes], splats: Splats) -> None:
    """The splats of one particle, row 0, in the form of the first implementation of Gaussian splatting.

    Opacities are logits, scales logarithms, rotations unit quaternions with the real part first, colours the constant
    spherical harmonic alone. Normals are 0; nothing reads them.
    """
    means, colors = splats.means[0], splats.colors[0]
    quaternions = torch.nn.functional.normalize(splats.quaternions[0], dim=-1)
    columns = (
        means,
        torch.zeros_like(means),
        (colors - 0.5) / _SH_0,
        splats.opacity_logits[0][:, None],
        splats.log_scales[0],
        quaternions,
    )
    names = ["x", "y", "z", "nx", "ny", "nz", *_numbered("f_dc", 3), "opacity"]
    names += [*_numbered("scale", 3), *_numbered("rot", 4)]
    rows = torch.cat([column.detach().float().cpu() for column in columns], dim=1)
    _begin_ply(stream, [f"element vertex {len(rows)}", *(f"property float {name}" for name in names)])
    stream.write(rows.contiguous().numpy().tobytes())


def _numbered(name: str, count: int) -> Sequence[str]:
    return [f"{name}_{index}" for index in range(count)]


def _begin_ply(stream: IO[bytes], elements: Sequence[str]) -> None:
    comment = "comment distvsd; world units, z up, front +x"
    stream.write("\n".join(("ply", "format binary_little_endian 1.0", comment, *elements, "end_header\n")).encode())


def _write_rows(stream: IO[bytes], *columns: Tensor) -> None:
    """Rows of bytes `[N, *]` side by side."""
    stream.write(torch.cat(columns, dim=1).numpy().tobytes())


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8).reshape(len(values), -1)


def _normal(row: Sequence[float]) -> str:
    return "vn {:.5g} {:.5g} {:.5g}".format(*row)
