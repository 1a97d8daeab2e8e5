"""Writes glTF 2.0 in its binary form (GLB): named nodes with a mesh each, coloured by a texture or at their vertices.

glTF is y up, its assets face +z, and its unit is the metre: a world unit becomes one. Colours are those that the
particle shows, so the materials are unlit (KHR_materials_unlit), and matt to readers that do not know the extension.
Textures are sRGB and colours of vertices linear, as the specification has it (sections 3.7.2.1 and 3.9.2).
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from typing import IO, Any, Final

import torch
from torch import Tensor

import distvsd
from distvsd.errors import RunError
from distvsd.looking.solid import Solid, Texture, y_up

MOST_BYTES: Final = 2**32 - 1  # lengths are 32 bits
_FLOAT, _UINT16, _UINT32 = 5126, 5123, 5125
_VERTEX_DATA, _INDEX_DATA = 34962, 34963
_LINEAR, _LINEAR_MIPMAP_LINEAR, _CLAMP_TO_EDGE = 9729, 9987, 33071
_SPACING: Final = 1.25  # of particles side by side, in widths of the widest


class Glb:
    """Collects solids and writes them as one file. Their numbers go to `spool` at once, so one solid at a time is in
    memory."""

    def __init__(self, spool: IO[bytes]) -> None:
        """spool: an empty file, for writing and reading."""
        self._spool, self._size = spool, 0
        self._extent = 0.0
        self._lists: dict[str, list[dict[str, Any]]] = {
            name: [] for name in ("nodes", "meshes", "materials", "textures", "images", "accessors", "bufferViews")
        }

    @property
    def count(self) -> int:
        """Solids in it."""
        return len(self._lists["nodes"])

    @property
    def fits(self) -> bool:
        """Whether the file is within what the format's lengths can say."""
        return 12 + 8 + len(self._document()) + 8 + self._size <= MOST_BYTES

    def add(self, solid: Solid) -> None:
        """Adds a node named after the solid."""
        lists = self._lists
        vertices = y_up(solid.vertices)
        self._extent = max(self._extent, float(vertices[:, [0, 2]].abs().max()))
        attributes = {
            "POSITION": self._accessor(vertices, _FLOAT, "VEC3", bounds=True),
            "NORMAL": self._accessor(y_up(solid.normals), _FLOAT, "VEC3"),
        }
        material: dict[str, Any] = {"metallicFactor": 0, "roughnessFactor": 1}
        if isinstance(solid.paint, Texture):
            attributes["TEXCOORD_0"] = self._accessor(solid.paint.coordinates, _FLOAT, "VEC2")
            view = self._view(solid.paint.png, None)
            lists["textures"].append({"sampler": 0, "source": len(lists["images"])})
            lists["images"].append({"name": solid.name, "bufferView": view, "mimeType": "image/png"})
            material["baseColorTexture"] = {"index": len(lists["textures"]) - 1}
        else:
            attributes["COLOR_0"] = self._accessor(_linear_16_bit(solid.paint), _UINT16, "VEC4", normalized=True)
        indices = self._accessor(solid.faces.reshape(-1, 1).int(), _UINT32, "SCALAR", target=_INDEX_DATA)
        primitive = {"attributes": attributes, "indices": indices, "material": len(lists["materials"]), "mode": 4}
        lists["nodes"].append({"name": solid.name, "mesh": len(lists["meshes"]), "extras": dict(solid.facts)})
        lists["meshes"].append({"name": solid.name, "primitives": [primitive]})
        lists["materials"].append(
            {
                "name": solid.name,
                "pbrMetallicRoughness": material,
                "doubleSided": True,
                "extensions": {"KHR_materials_unlit": {}},
            }
        )

    def write(self, stream: IO[bytes]) -> None:
        """Writes the file; several nodes stand side by side, see `_places`. Raises RunError where it would be too large
        for the format."""
        if not self.fits:
            raise RunError(
                f"a GLB holds at most 4 GiB, and {self.count} particles need more; choose fewer with "
                "--particles, or a smaller --texture"
            )
        document = self._document()
        stream.write(struct.pack("<4sII", b"glTF", 2, 12 + 8 + len(document) + 8 + self._size))
        stream.write(struct.pack("<I4s", len(document), b"JSON") + document)
        stream.write(struct.pack("<I4s", self._size, b"BIN\0"))
        self._spool.seek(0)
        shutil.copyfileobj(self._spool, stream, 1 << 20)
        self._spool.seek(self._size)

    def _document(self) -> bytes:
        nodes = self._lists["nodes"]
        if len(nodes) > 1:
            places = _places(len(nodes), _SPACING * 2 * self._extent)
            nodes = [node | {"translation": place} for node, place in zip(nodes, places, strict=True)]
        content: dict[str, Any] = {
            "asset": {"version": "2.0", "generator": f"distvsd {distvsd.__version__}"},
            "extensionsUsed": ["KHR_materials_unlit"],
            "scene": 0,
            "scenes": [{"nodes": list(range(len(nodes)))}],
            "buffers": [{"byteLength": self._size}],
        }
        content |= {name: entries for name, entries in self._lists.items() if entries} | {"nodes": nodes}
        if self._lists["textures"]:
            filters = {"magFilter": _LINEAR, "minFilter": _LINEAR_MIPMAP_LINEAR}
            content["samplers"] = [filters | {"wrapS": _CLAMP_TO_EDGE, "wrapT": _CLAMP_TO_EDGE}]
        text = json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode("utf-8")
        return text + b" " * (-len(text) % 4)

    def _accessor(
        self,
        values: Tensor,
        component: int,
        kind: str,
        bounds: bool = False,
        normalized: bool = False,
        target: int = _VERTEX_DATA,
    ) -> int:
        entry = {
            "bufferView": self._view(values.contiguous().numpy().tobytes(), target),
            "componentType": component,
            "count": len(values),
            "type": kind,
        }
        if bounds:
            entry |= {"min": values.amin(0).tolist(), "max": values.amax(0).tolist()}
        if normalized:
            entry["normalized"] = True
        self._lists["accessors"].append(entry)
        return len(self._lists["accessors"]) - 1

    def _view(self, data: bytes, target: int | None) -> int:
        entry = {"buffer": 0, "byteOffset": self._size, "byteLength": len(data)}
        self._lists["bufferViews"].append(entry if target is None else entry | {"target": target})
        padded = data + b"\0" * (-len(data) % 4)  # every part begins at a multiple of 4
        self._spool.write(padded)
        self._size += len(padded)
        return len(self._lists["bufferViews"]) - 1


def linear(colors: Tensor) -> Tensor:
    """Linear values of sRGB ones in [0, 1] (IEC 61966-2-1)."""
    return torch.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)


def _linear_16_bit(colors_N3: Tensor) -> Tensor:
    values = (linear(colors_N3.double()).clamp(0, 1) * 65535).round()
    opaque = torch.full((len(values), 1), 65535.0, dtype=torch.float64)
    return torch.cat((values, opaque), dim=1).to(torch.uint16)


def _places(count: int, step: float) -> list[list[float]]:
    """Where nodes stand on the ground, around the origin: a square grid in reading order as seen from above, the front
    below."""
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    places = [divmod(index, columns) for index in range(count)]
    return [[(column - (columns - 1) / 2) * step, 0.0, (row - (rows - 1) / 2) * step] for row, column in places]
