"""OBJ and PLY files: by hand, and as trimesh reads them."""

import io

import numpy
import pytest
import torch
import trimesh
from PIL import Image

from distvsd.looking.mesh_files import write_mtl, write_obj, write_ply, write_splats
from distvsd.render.splat import Splats
from tests.unit.looking.solids import TRIANGLE, cube, solid


def content(write, *arguments):
    stream = io.BytesIO()
    write(stream, *arguments)
    return stream.getvalue()


def orange(points):
    return torch.tensor([1.0, 0.5, 0.0]).expand_as(points)


def test_an_obj_of_one_triangle_is_what_it_should_be():
    assert content(write_obj, solid(TRIANGLE, name="particle-000003", color=orange), "unused").decode() == (
        "# distvsd; world units, y up, front +z\no particle-000003\n"
        "v 0 0 0 1.0000 0.5000 0.0000\nv 0 0 1 1.0000 0.5000 0.0000\nv 2 0 0 1.0000 0.5000 0.0000\n"
        "vn 0 1 0\nvn 0 1 0\nvn 0 1 0\nf 1//1 2//2 3//3\n"
    )


def test_an_obj_with_its_material_and_picture_comes_back(tmp_path):
    made = solid(cube(), texture=128, name="a")
    (tmp_path / "a.obj").write_bytes(content(write_obj, made, "a.mtl"))
    (tmp_path / "a.mtl").write_bytes(content(write_mtl, made, "a.png"))
    (tmp_path / "a.png").write_bytes(made.paint.png)
    mesh = trimesh.load_mesh(tmp_path / "a.obj", process=False)
    assert mesh.volume == pytest.approx(1)
    picture = mesh.visual.material.image
    assert picture.size == (128, 128)
    numpy.testing.assert_array_equal(numpy.asarray(picture), made.paint.pixels.numpy())
    # v counts upward in the file, and downward in the solid.
    expected = made.paint.coordinates.numpy() * [1, -1] + [0, 1]
    numpy.testing.assert_allclose(mesh.visual.uv, expected, atol=1e-6)
    numpy.testing.assert_allclose(mesh.vertices[:, [2, 0, 1]], made.vertices.numpy(), atol=1e-6)


def test_an_obj_without_a_texture_has_colours_at_its_vertices():
    mesh = trimesh.load_mesh(io.BytesIO(content(write_obj, solid(cube()), "")), file_type="obj", process=False)
    assert mesh.is_watertight
    world = mesh.vertices[:, [2, 0, 1]]
    assert numpy.abs(mesh.visual.vertex_colors[:, :3] / 255 - (world / 2 + 0.5)).max() < 1 / 255


def test_a_ply_keeps_the_axes_of_the_world_and_its_colours():
    data = content(write_ply, solid(cube()))
    header, _, body = data.partition(b"end_header\n")
    assert header.splitlines()[:2] == [b"ply", b"format binary_little_endian 1.0"]
    assert len(body) == 8 * (6 * 4 + 3) + 12 * (1 + 3 * 4)
    mesh = trimesh.load_mesh(io.BytesIO(data), file_type="ply", process=False)
    numpy.testing.assert_array_equal(mesh.vertices, cube()[0])
    numpy.testing.assert_array_equal(mesh.faces, cube()[1])
    assert mesh.volume == pytest.approx(1)
    assert numpy.abs(mesh.visual.vertex_colors[:, :3] / 255 - (mesh.vertices / 2 + 0.5)).max() <= 0.5 / 255 + 1e-6


def test_a_ply_has_no_texture():
    with pytest.raises(ValueError, match="without a texture"):
        write_ply(io.BytesIO(), solid(cube(), texture=64))


def test_splats_are_the_columns_that_viewers_of_them_read():
    splats = Splats(
        means=torch.tensor([[[1.0, 2, 3], [4, 5, 6]]]),
        log_scales=torch.tensor([[[-1.0, -2, -3], [0, 0, 0]]]),
        quaternions=torch.tensor([[[2.0, 0, 0, 0], [0, 3, 0, 4]]]),
        opacity_logits=torch.tensor([[0.5, -0.5]]),
        color_logits=torch.tensor([[[0.5, 0.9, 0.1], [0.25, 0.5, 0.75]]]).logit(),
    )
    header, _, body = content(write_splats, splats).partition(b"end_header\n")
    names = [line.split()[-1].decode() for line in header.splitlines() if line.startswith(b"property float")]
    places, rest = "x y z nx ny nz f_dc_0 f_dc_1 f_dc_2 opacity", "scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3"
    assert names == [*places.split(), *rest.split()]
    assert b"element vertex 2\n" in header
    rows = numpy.frombuffer(body, [(name, "<f4") for name in names])
    assert [rows[name].tolist() for name in "xyz"] == [[1, 4], [2, 5], [3, 6]]
    # A viewer computes 0.5 + f C, with C = 1 / (2 sqrt(pi)), and expects quaternions of unit length.
    shown = numpy.stack([0.5 + rows[f"f_dc_{k}"] / (2 * numpy.pi**0.5) for k in range(3)], axis=1)
    numpy.testing.assert_allclose(shown, splats.colors[0], atol=1e-6)
    assert rows["opacity"].tolist() == [0.5, -0.5]
    assert [rows[f"scale_{k}"].tolist() for k in range(3)] == [[-1, 0], [-2, 0], [-3, 0]]
    turns = numpy.stack([rows[f"rot_{k}"] for k in range(4)], axis=1)
    numpy.testing.assert_allclose(turns, [[1, 0, 0, 0], [0, 0.6, 0, 0.8]], atol=1e-6)
    # As any reader of PLY sees it: a cloud of points.
    cloud = trimesh.load(io.BytesIO(content(write_splats, splats)), file_type="ply")
    assert cloud.vertices.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_a_picture_of_a_texture_is_a_png_of_its_pixels():
    made = solid(cube(), texture=64)
    picture = numpy.asarray(Image.open(io.BytesIO(made.paint.png)))
    numpy.testing.assert_array_equal(picture, made.paint.pixels.numpy())
