"""Which face a pixel sees, against a ray caster that tries every face, and by hand."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distvsd.cameras import Cameras, rays
from distvsd.cameras.base import look_at_origin
from distvsd.errors import BackendError
from distvsd.render import raster
from distvsd.render.meshes import Meshes
from distvsd.render.raster import raster_backend, rasterize

CPU = torch.device("cpu")


def orbit(particles: int, views: int, seed: int = 0, distance: float = 2.0) -> Cameras:
    generator = torch.Generator().manual_seed(seed)
    elevation, azimuth = torch.rand(2, particles, views, generator=generator, dtype=torch.float64) - 0.5
    ones = torch.ones_like(azimuth)
    return look_at_origin(elevation, azimuth * 6, distance * ones, 0.8 * ones)


def soup(counts: tuple[int, ...], seed: int = 0, size: float = 1.0) -> Meshes:
    """Random triangles, some of them through others."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for count in counts:
        middle = torch.rand(count, 1, 3, generator=generator, dtype=torch.float64) - 0.5
        corners = middle + size * (torch.rand(count, 3, 3, generator=generator, dtype=torch.float64) - 0.5)
        parts.append((corners.reshape(-1, 3), torch.arange(3 * count).reshape(-1, 3)))
    return Meshes.of(parts)


def cast(meshes: Meshes, cameras: Cameras, resolution: int) -> Tensor:
    """The nearest face beyond the near plane, by solving for the crossing of every ray with the plane of every face."""
    origins, directions = rays(cameras, resolution, resolution)
    forward = -cameras.extrinsics[:, :, None, None, :3, 2]
    depth_per_step = (directions * forward).sum(-1)
    faces = torch.full(directions.shape[:-1], -1)
    for particle in range(len(meshes)):
        first = 0 if particle == 0 else meshes.face_ends[particle - 1]
        vertices, own = meshes.one(particle)
        nearest = torch.full(directions.shape[1:-1], torch.inf, dtype=torch.float64)
        for row, (a, b, c) in enumerate(vertices[own]):
            d, o = directions[particle], origins[particle][:, None, None]
            system = torch.stack(torch.broadcast_tensors(-d, b - a, c - a), dim=-1)
            t, u, v = torch.linalg.solve(system, (o - a).expand_as(d)).unbind(-1)
            hit = (t * depth_per_step[particle] > raster.NEAR) & (u >= 0) & (v >= 0) & (u + v <= 1) & (t < nearest)
            nearest = torch.where(hit, t, nearest)
            faces[particle][hit] = first + row
    return faces


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000))
def test_every_pixel_sees_the_face_that_its_ray_meets_first(seed: int) -> None:
    meshes, cameras = soup((12, 0, 7), seed), orbit(3, 2, seed)
    assert torch.equal(rasterize(meshes, cameras, 24).face, cast(meshes, cameras, 24))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000))
def test_a_camera_in_the_middle_of_the_faces_needs_no_clipping(seed: int) -> None:
    """Faces pass beside and behind it, and through its plane."""
    meshes, cameras = soup((30,), seed, size=3.0), orbit(1, 2, seed, distance=0.2)
    assert torch.equal(rasterize(meshes, cameras, 24).face, cast(meshes, cameras, 24))


def test_float32_sees_the_same_but_for_rays_through_edges() -> None:
    meshes, cameras = soup((40,), 5), orbit(1, 4, 5)
    single = Meshes(meshes.vertices.float(), meshes.faces, meshes.vertex_ends, meshes.face_ends)
    views = Cameras(*(getattr(cameras, name).float() for name in ("extrinsics", "fovy", "elevation", "azimuth")))
    found, expected = rasterize(single, views, 64).face, rasterize(meshes, cameras, 64).face
    assert (found != expected).double().mean() < 1e-3


def test_no_ray_passes_between_two_faces_that_share_an_edge() -> None:
    """A fan of thin faces over the whole view."""
    angle = torch.linspace(0, 2 * math.pi, 302, dtype=torch.float32)[:-1]
    ring = torch.stack((torch.zeros_like(angle), 3 * angle.cos(), 3 * angle.sin()), dim=1)
    vertices = torch.cat((torch.tensor([[0.0, 0.011, -0.007]]), ring))
    place = torch.arange(301)
    faces = torch.stack((torch.zeros_like(place), place + 1, (place + 1) % 301 + 1), dim=1)
    zero = torch.zeros(1, 1)
    camera = look_at_origin(zero, zero, zero + 2, zero + 0.8)
    assert rasterize(Meshes.of([(vertices, faces)]), camera, 200).hit.all()


def test_a_square_covers_the_pixels_that_it_should() -> None:
    """From 2 away with a field of view of 2 atan(1/2) the view is 2 wide: a square of 1 is the middle 8 of 16
    pixels."""
    square = torch.tensor([[0.0, -0.5, -0.5], [0, 0.5, -0.5], [0, 0.5, 0.5], [0, -0.5, 0.5]])
    zero = torch.zeros(1, 1)
    camera = look_at_origin(zero, zero, zero + 2, zero + 2 * math.atan(0.5))
    hit = rasterize(Meshes.of([(square, torch.tensor([[0, 1, 2], [0, 2, 3]]))]), camera, 16).hit[0, 0]
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[4:12, 4:12] = True
    assert torch.equal(hit, expected)


def test_with_little_memory_it_sees_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    meshes, cameras = soup((50, 20), 7), orbit(2, 2, 7)
    expected = rasterize(meshes, cameras, 32).face
    monkeypatch.setattr(raster, "MOST_CANDIDATES", 700)
    assert torch.equal(rasterize(meshes, cameras, 32).face, expected)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_face_with_a_vertex_that_is_not_finite_is_left_out_and_nothing_else(value: float) -> None:
    meshes, cameras = soup((8, 8), 2), orbit(2, 1, 2)
    vertices = meshes.vertices.clone()
    vertices[0, 1] = value
    broken = Meshes(vertices, meshes.faces, meshes.vertex_ends, meshes.face_ends)
    without = Meshes(meshes.vertices[3:], meshes.faces[1:] - 3, (21, 45), (7, 15))
    expected = rasterize(without, cameras, 16).face
    assert torch.equal(rasterize(broken, cameras, 16).face, torch.where(expected >= 0, expected + 1, expected))


def test_no_face_and_faces_behind_the_camera_are_nothing_to_see() -> None:
    cameras = orbit(1, 1)
    assert not rasterize(soup((0,)), cameras, 8).hit.any()
    behind = soup((5,))
    away = Meshes(behind.vertices + 5 * cameras.extrinsics[0, 0, :3, 2], behind.faces, (15,), (5,))
    assert not rasterize(away, cameras, 8).hit.any()


def test_a_face_without_an_area_is_not_seen() -> None:
    line = torch.tensor([[0.0, -1, 0], [0, 0, 0], [0, 1, 0]], dtype=torch.float64)
    assert not rasterize(Meshes.of([(line, torch.tensor([[0, 1, 2]]))]), orbit(1, 3), 32).hit.any()


def test_a_backend_that_is_asked_for_and_cannot_run_is_an_error() -> None:
    assert raster_backend("auto", "fast", CPU) == "torch"
    for backend in ("nvdiffrast", "drtk"):
        with pytest.raises(BackendError, match=f"{backend}, which needs CUDA.*on cpu; install it.*backend=torch"):
            raster_backend(backend, "fast", CPU)


def as_drtk_documents(v: Tensor, vi: Tensor, height: int, width: int) -> Tensor:
    """`drtk.rasterize` by its documentation, a triangle at a time: v `[N, V, 3]` holds pixels, whose first centre is
    (0, 0), and camera depth; vi `[F, 3]` int32 is shared by the N images. Depth is interpolated with perspective."""
    assert v.dtype == torch.float32 and vi.dtype == torch.int32 and v.is_contiguous() and vi.is_contiguous()
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    found = torch.full((len(v), height, width), -1, dtype=torch.int32)
    for image, points in enumerate(v.double()):
        nearest = torch.full((height, width), torch.inf, dtype=torch.float64)
        for row, (a, b, c) in enumerate(points[vi.long()]):
            if min(a[2], b[2], c[2]) <= 0:
                continue
            whole = (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
            of_b = ((x - a[0]) * (c[1] - a[1]) - (y - a[1]) * (c[0] - a[0])) / whole
            of_c = ((b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0])) / whole
            depth = 1 / ((1 - of_b - of_c) / a[2] + of_b / b[2] + of_c / c[2])
            hit = (of_b >= 0) & (of_c >= 0) & (of_b + of_c <= 1) & (depth < nearest)
            nearest[hit], found[image][hit] = depth[hit], row
    return found


def test_drtk_is_given_what_its_documentation_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library itself needs CUDA; tests/gpu compares it where it is installed."""
    monkeypatch.setitem(sys.modules, "drtk", types.SimpleNamespace(rasterize=as_drtk_documents))
    meshes, cameras = soup((6, 0, 9)), orbit(3, 2)
    lost = meshes.vertices.clone()
    lost[4] = torch.nan  # of the second face
    meshes = Meshes(lost, meshes.faces, meshes.vertex_ends, meshes.face_ends)
    found, expected = (rasterize(meshes, cameras, 24, backend).face for backend in ("drtk", "torch"))
    assert (found != expected).double().mean() < 2e-3 and expected.unique().numel() > 8
    assert not (found == 1).any() and (found[1] == -1).all()
