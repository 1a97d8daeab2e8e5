"""Solids whose files are known by hand, and an independent reader of GLB."""

import json
import struct
from dataclasses import dataclass

import numpy
import pytest
import torch

from distvsd.looking.solid import solid_of
from distvsd.render.meshes import Meshes, Surface

SIZES = {5126: ("<f4", 4), 5123: ("<u2", 2), 5125: ("<u4", 4)}
WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}

TRIANGLE = (torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 2, 0]]), torch.tensor([[0, 1, 2]]))  # its normal is +z


def cube(edge=1.0):
    """Vertices and faces of a cube around the origin, counter-clockwise from outside."""
    corners = torch.tensor([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=torch.float32)
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = [triangle for a, b, c, d in quads for triangle in ((a, b, c), (a, c, d))]
    return (corners - 0.5) * edge, torch.tensor(faces)


def by_place(points):
    """The colour of a world point is its place, from [-1, 1] to [0, 1]."""
    return points / 2 + 0.5


def surface(mesh, color=by_place):
    return Surface(Meshes.of([mesh]), color)


def solid(mesh, texture=0, name="a", color=by_place, **facts):
    if texture:
        pytest.importorskip("xatlas")
    made = solid_of(surface(mesh, color), texture, name, facts)
    assert made is not None
    return made


@dataclass
class Glb:
    """A GLB as it is read: its document, its binary part, and each accessor as an array."""

    document: dict
    data: bytes

    @staticmethod
    def read(content):
        """Reads a file, and checks all that its reader relies on."""
        magic, version, length = struct.unpack_from("<4sII", content)
        assert (magic, version, length) == (b"glTF", 2, len(content))
        chunks, at = [], 12
        while at < len(content):
            size, kind = struct.unpack_from("<I4s", content, at)
            assert size % 4 == 0
            chunks.append((kind, content[at + 8 : at + 8 + size]))
            at += 8 + size
        assert at == len(content) and [kind for kind, _ in chunks] == [b"JSON", b"BIN\0"]
        read = Glb(json.loads(chunks[0][1].decode("utf-8")), chunks[1][1])
        read._check()
        return read

    def accessor(self, index):
        entry = self.document["accessors"][index]
        kind, width = SIZES[entry["componentType"]][0], WIDTHS[entry["type"]]
        data = self.view(entry["bufferView"])
        return numpy.frombuffer(data, kind, entry["count"] * width).reshape(entry["count"], width)

    def view(self, index):
        entry = self.document["bufferViews"][index]
        assert entry["buffer"] == 0 and entry["byteOffset"] % 4 == 0
        assert entry["byteOffset"] + entry["byteLength"] <= len(self.data)
        return self.data[entry["byteOffset"] : entry["byteOffset"] + entry["byteLength"]]

    def primitive(self, name):
        """Arrays of the mesh of the node of this name: its attributes, and its triangles."""
        [node] = [node for node in self.document["nodes"] if node["name"] == name]
        [primitive] = self.document["meshes"][node["mesh"]]["primitives"]
        arrays = {key: self.accessor(index) for key, index in primitive["attributes"].items()}
        return arrays | {"triangles": self.accessor(primitive["indices"]).reshape(-1, 3)}

    def _check(self):
        document = self.document
        assert document["asset"]["version"] == "2.0"
        assert document["buffers"] == [{"byteLength": len(self.data)}]
        [scene] = document["scenes"]
        assert sorted(scene["nodes"]) == list(range(len(document["nodes"])))
        names = [node["name"] for node in document["nodes"]]
        assert len(set(names)) == len(names)
        for name in names:
            arrays = self.primitive(name)
            positions, triangles = arrays["POSITION"], arrays.pop("triangles")
            assert {len(array) for array in arrays.values()} == {len(positions)}
            assert triangles.max() < len(positions)
            numpy.testing.assert_allclose(numpy.linalg.norm(arrays["NORMAL"], axis=1), 1, atol=1e-6)
        for mesh in document["meshes"]:
            [primitive] = mesh["primitives"]
            accessor = document["accessors"][primitive["attributes"]["POSITION"]]
            positions = self.accessor(primitive["attributes"]["POSITION"])
            assert accessor["min"] == positions.min(0).tolist() and accessor["max"] == positions.max(0).tolist()
            for attribute in primitive["attributes"].values():
                assert document["bufferViews"][document["accessors"][attribute]["bufferView"]]["target"] == 34962
            indices = document["accessors"][primitive["indices"]]
            assert document["bufferViews"][indices["bufferView"]]["target"] == 34963
            material = document["materials"][primitive["material"]]
            assert set(material["extensions"]) <= set(document["extensionsUsed"])
            texture = material["pbrMetallicRoughness"].get("baseColorTexture")
            assert (texture is not None) == ("TEXCOORD_0" in primitive["attributes"])
            if texture is not None:
                picture = document["textures"][texture["index"]]
                assert picture["sampler"] < len(document["samplers"])
                image = document["images"][picture["source"]]
                assert image["mimeType"] == "image/png"
                assert self.view(image["bufferView"]).startswith(b"\x89PNG\r\n\x1a\n")
