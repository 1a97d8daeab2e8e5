"""GLB files: known solids by hand, an independent reader, trimesh, and the Khronos validator where it is installed."""

import io
import json
import math
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy
import pytest
import torch
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st

from distvsd.errors import RunError
from distvsd.looking import glb
from tests.unit.looking import solids
from tests.unit.looking.solids import TRIANGLE, cube, solid

VALIDATE = """
const [folder, file] = process.argv.slice(1);
const validator = require(folder);
validator.validateBytes(new Uint8Array(require("fs").readFileSync(file))).then((report) => {
  console.log(JSON.stringify({issues: report.issues, version: validator.version()}));
});
"""


def written(*made):
    """The bytes of one file with these solids."""
    stream = io.BytesIO()
    file = glb.Glb(io.BytesIO())
    for one in made:
        file.add(one)
    file.write(stream)
    return stream.getvalue()


@cache
def validator():
    """The folder of npm's gltf-validator: GLTF_VALIDATOR, or among node's global packages; None where there is none."""
    if shutil.which("node") is None:
        return None
    found = os.environ.get("GLTF_VALIDATOR")
    if found is None and shutil.which("npm"):
        root = subprocess.run(["npm", "root", "-g"], capture_output=True, text=True, check=False).stdout.strip()
        found = f"{root}/gltf-validator"
    return found if found and Path(found).is_dir() else None


FILES = {
    "textured": lambda: written(solid(cube(), texture=128, prompt="a caf\u00e9")),
    "coloured at vertices": lambda: written(solid(cube())),
    "one triangle": lambda: written(solid(TRIANGLE)),
    "one textured triangle": lambda: written(solid(TRIANGLE, texture=64)),
    "several": lambda: written(solid(cube(), 64, "a"), solid(TRIANGLE, 0, "b"), solid(cube(0.2), 64, "c", particle=2)),
}


@pytest.mark.parametrize("kind", FILES)
def test_the_validator_of_khronos_finds_nothing_to_say(kind, tmp_path):
    folder = validator()
    if folder is None:
        pytest.skip("needs node and npm's gltf-validator: GLTF_VALIDATOR=.../node_modules/gltf-validator")
    file = tmp_path / "a.glb"
    file.write_bytes(FILES[kind]())
    done = subprocess.run(["node", "-e", VALIDATE, folder, str(file)], capture_output=True, text=True, check=True)
    issues = json.loads(done.stdout)["issues"]
    assert issues["messages"] == []
    assert [issues[name] for name in ("numErrors", "numWarnings", "numInfos", "numHints")] == [0, 0, 0, 0]


@pytest.mark.parametrize("kind", FILES)
def test_every_reference_length_and_limit_of_a_file_is_right(kind):
    solids.Glb.read(FILES[kind]())


def test_a_triangle_is_the_numbers_that_it_should_be():
    """World (x, y, z) is (y, z, x) in the file: its normal +z is +y there."""
    content = solids.Glb.read(
        written(solid(TRIANGLE, color=lambda points: torch.tensor([1.0, 0.5, 0.0]).expand_as(points)))
    )
    arrays = content.primitive("a")
    assert arrays["POSITION"].tolist() == [[0, 0, 0], [0, 0, 1], [2, 0, 0]]
    assert arrays["NORMAL"].tolist() == [[0, 1, 0]] * 3
    assert arrays["triangles"].tolist() == [[0, 1, 2]]
    half = ((0.5 + 0.055) / 1.055) ** 2.4  # colours of vertices are linear, those of particles sRGB
    assert arrays["COLOR_0"].tolist() == [[65535, round(65535 * half), 0, 65535]] * 3
    assert content.document["nodes"] == [{"name": "a", "mesh": 0, "extras": {}}]


def test_the_world_stands_upright_and_its_front_faces_the_viewer():
    front, left, up = torch.eye(3)
    assert glb.y_up(front).tolist() == [0, 0, 1]  # the front of an asset faces +z
    assert glb.y_up(up).tolist() == [0, 1, 0]
    turn = glb.y_up(torch.eye(3)).T
    assert torch.linalg.det(turn) == pytest.approx(1)  # a rotation: nothing is mirrored
    assert (turn @ left).tolist() == [1, 0, 0]


def test_a_cube_comes_back_from_trimesh_with_its_volume_and_its_texture():
    scene = trimesh.load_scene(io.BytesIO(written(solid(cube(), texture=128))), file_type="glb")
    [mesh] = scene.geometry.values()
    assert mesh.volume == pytest.approx(1) and mesh.bounds.tolist() == [[-0.5] * 3, [0.5] * 3]
    assert mesh.visual.material.baseColorTexture.size == (128, 128)
    assert mesh.visual.material.metallicFactor == 0 and mesh.visual.material.roughnessFactor == 1
    # Every world point has its own colour, so what is read at a vertex says which vertex it is.
    picture = numpy.asarray(mesh.visual.material.baseColorTexture.convert("RGB")) / 255
    edge = len(picture)
    u, v = mesh.visual.uv.T  # trimesh turns v over
    rows, columns = ((1 - v) * edge).clip(0, edge - 1).astype(int), (u * edge).clip(0, edge - 1).astype(int)
    world = mesh.vertices[:, [2, 0, 1]]
    assert numpy.abs(picture[rows, columns] - (world / 2 + 0.5)).max() < 0.03


def test_several_solids_are_named_nodes_side_by_side_that_do_not_touch():
    names = [f"particle-{k:06d}" for k in range(7)]
    made = [solid(cube(1 + k / 10), 0, name, particle=k, prompt="a cube") for k, name in enumerate(names)]
    data = written(*made)
    content = solids.Glb.read(data)
    assert [node["name"] for node in content.document["nodes"]] == names
    assert [node["extras"] for node in content.document["nodes"]] == [
        {"particle": k, "prompt": "a cube"} for k in range(7)
    ]
    scene = trimesh.load_scene(io.BytesIO(data), file_type="glb")
    boxes = [scene.geometry[name].bounds + scene.graph.get(name)[0][:3, 3] for name in names]
    for first in range(7):
        for second in range(first):
            a, b = boxes[first], boxes[second]
            assert (a[0] > b[1]).any() or (b[0] > a[1]).any()
    heights = {tuple(node["translation"])[1] for node in content.document["nodes"]}
    assert heights == {0.0}


def test_one_solid_alone_stays_where_it_was():
    assert "translation" not in solids.Glb.read(written(solid(cube()))).document["nodes"][0]


def test_the_same_solids_are_the_same_bytes():
    assert FILES["several"]() == FILES["several"]()


def test_what_is_larger_than_the_format_can_say_is_refused(monkeypatch):
    file = glb.Glb(io.BytesIO())
    file.add(solid(cube()))
    assert file.fits
    monkeypatch.setattr(glb, "MOST_BYTES", 1000)
    assert not file.fits
    with pytest.raises(RunError, match="--particles"):
        file.write(io.BytesIO())


def test_linear_values_are_those_of_the_standard():
    values = torch.tensor([0.0, 0.04045, 0.5, 1.0], dtype=torch.float64)
    expected = [0.0, 0.0031308, 0.21404114, 1.0]
    assert glb.linear(values).tolist() == pytest.approx(expected, abs=1e-7)


@st.composite
def meshes(draw):
    count = draw(st.integers(3, 12))
    numbers = st.floats(-3, 3, width=32, allow_subnormal=False)
    vertices = torch.tensor([[draw(numbers) for _ in range(3)] for _ in range(count)])
    index = st.integers(0, count - 1)
    faces = torch.tensor(draw(st.lists(st.tuples(index, index, index), min_size=1, max_size=12)))
    return vertices, faces


@settings(max_examples=40, deadline=None)
@given(mesh=meshes())
def test_any_mesh_is_a_sound_file_with_its_triangles(mesh):
    made = solids.solid_of(solids.surface(mesh), 0, "a", {})
    corners = mesh[0].double()[mesh[1]]
    areas = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]).norm(dim=1) / 2
    if made is None:
        assert not bool((areas > 0).any())
        return
    arrays = solids.Glb.read(written(made)).primitive("a")
    kept = numpy.array(mesh[0].numpy()[mesh[1].numpy()][(areas > 0).numpy()])  # in their order
    assert numpy.array_equal(arrays["POSITION"][arrays["triangles"]], kept[..., [1, 2, 0]])
    assert math.isclose(float(areas.sum()), _area(arrays), rel_tol=1e-5, abs_tol=1e-6)


def _area(arrays):
    a, b, c = arrays["POSITION"].astype(float)[arrays["triangles"]].transpose(1, 0, 2)
    return numpy.linalg.norm(numpy.cross(b - a, c - a), axis=1).sum() / 2
