"""Which triangle each pixel sees. What is computed from that, with gradients, is in `render/shade.py`.

The `torch` backend runs on every device, in float32 and float64, without a Python loop over particles, views or
triangles. It needs no clipping: a pixel is inside a triangle where its ray passes the three planes through the camera
and the triangle's sides on the same side (Olano and Greer, Triangle Scan Conversion using 2D Homogeneous Coordinates,
1997).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from distvsd.cameras import Cameras
from distvsd.errors import BackendError
from distvsd.render.meshes import Meshes

RasterBackend = Literal["torch", "nvdiffrast", "drtk"]

NEAR = 1e-3  # world units; what is nearer to a camera's plane is not drawn
_SOURCES: dict[RasterBackend, str] = {
    "nvdiffrast": "github.com/NVlabs/nvdiffrast",
    "drtk": "github.com/facebookresearch/DRTK",
}
MOST_CANDIDATES = 2**24  # pairs of triangle and pixel that are looked at in one go; 100 bytes each


@dataclass(frozen=True)
class Fragments:
    """What P particles show to V cameras on H x H pixels.

    face: `[P, V, H, H]` int64, rows of `Meshes.faces`; -1 where a pixel sees none.
    """

    face: Tensor

    @property
    def hit(self) -> Tensor:
        """`[P, V, H, H]` bool."""
        return self.face >= 0


def raster_backend(
    asked: Literal["auto", "torch", "nvdiffrast", "drtk"], numerics: Literal["fast", "exact"], device: torch.device
) -> RasterBackend:
    """The backend that was asked for; auto is nvdiffrast or else drtk on CUDA, where they are installed and the bits
    need not be those of other machines.

    Raises BackendError where what was asked for cannot be used.
    """
    if asked in _SOURCES:
        why = _what_is_missing(asked, device)
        if why is not None:
            raise BackendError(
                f"render.raster_backend is {asked}, which {why}; install it from its source ({_SOURCES[asked]}), or "
                "set render.raster_backend=torch"
            )
    if asked != "auto":
        return asked
    usable: list[RasterBackend] = [name for name in _SOURCES if _what_is_missing(name, device) is None]
    return usable[0] if usable and numerics == "fast" else "torch"


def _what_is_missing(backend: RasterBackend, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"needs CUDA, and this rank is on {device}"
    if find_spec(backend) is None:
        return "is not installed"
    if backend == "drtk" and find_spec("drtk.rasterize") is None:
        return "is not installed: the package of that name on the index is another one"
    return None


@torch.no_grad()
def rasterize(meshes: Meshes, cameras: Cameras, resolution: int, backend: RasterBackend = "torch") -> Fragments:
    """The nearest face at each pixel centre, both sides of a face alike; cameras `[P, V]`, on the device of the meshes.

    Faces with a vertex that is not finite are left out. Not differentiable.
    """
    if backend == "nvdiffrast":
        return _nvdiffrast(meshes, cameras, resolution)
    if backend == "drtk":
        return _drtk(meshes, cameras, resolution)
    pixels = cameras.shape.numel() * resolution**2
    depth = meshes.vertices.new_full((pixels,), torch.inf)
    none = len(meshes.faces)
    face = torch.full((pixels,), none, dtype=torch.int64, device=depth.device)
    boxes = _boxes(meshes, cameras, resolution)
    for chunk in _chunks(boxes.size.prod(-1)):
        _draw(boxes, chunk, resolution, depth, face)
    face[face == none] = -1
    return Fragments(face.reshape(*cameras.shape, resolution, resolution))


def in_camera(points: Tensor, owners: Tensor, cameras: Cameras) -> Tensor:
    """World points `[N, 3]` of particles `owners` `[N]` as each of their cameras `[P, V]` sees them: `[N, V, 3]`, x to
    the right, y up, z backwards. Differentiable in the points."""
    rotation, position = cameras.extrinsics[..., :3, :3], cameras.extrinsics[..., :3, 3]
    return torch.einsum("nvj,nvji->nvi", points[:, None] - position[owners], rotation[owners])


def to_pixels(points: Tensor, half: Tensor, resolution: int) -> Tensor:
    """Pixel coordinates `[..., 2]` of points `[..., 3]` in the camera's frame; the centre of pixel (column i, row j) is
    at (i + 0.5, j + 0.5). half: `[...]`, tan(fovy / 2)."""
    scale = resolution / 2 / (half * -points[..., 2])
    return torch.stack((points[..., 0] * scale, -points[..., 1] * scale), dim=-1) + resolution / 2


@dataclass(frozen=True)
class _Boxes:
    """K pairs of a face and a view in which it may cover pixels.

    face, image: `[K]`, row of the face, and p V + v of the view. planes: `[K, 3, 3]`, normals of the planes through the
    camera and a side, in the camera's frame; volume: `[K]`, six times that of the tetrahedron with the camera. half:
    `[K]`, tan(fovy / 2). first, size: `[K, 2]`, column and row of the first pixel, columns and rows.
    """

    face: Tensor
    image: Tensor
    planes: Tensor
    volume: Tensor
    half: Tensor
    first: Tensor
    size: Tensor


def _boxes(meshes: Meshes, cameras: Cameras, resolution: int) -> _Boxes:
    seen = in_camera(meshes.vertices, meshes.vertex_owners, cameras)[meshes.faces].transpose(1, 2)  # [M, V, 3, 3]
    half = torch.tan(cameras.fovy / 2)[meshes.face_owners]
    # The box is that of the part before the near plane: its corners, and the points where its sides cross the plane.
    following = seen.roll(-1, 2)
    before, after = -seen[..., 2] - NEAR, -following[..., 2] - NEAR
    crosses = (before > 0) != (after > 0)
    at = torch.where(crosses, before / (before - after), torch.zeros_like(before))
    drawn = torch.cat((seen, seen + (following - seen) * at[..., None]), dim=2)
    is_real = torch.cat((before > 0, crosses), dim=2)[..., None]
    spots = to_pixels(drawn, half[..., None], resolution)
    low, high = torch.where(is_real, spots, torch.inf).amin(2), torch.where(is_real, spots, -torch.inf).amax(2)
    first = torch.ceil(low.clamp(-1, resolution + 1) - 0.5).clamp_min(0)
    last = torch.floor(high.clamp(-1, resolution + 1) - 0.5).clamp_max(resolution - 1)
    size = last - first + 1
    finite = seen.isfinite().all(-1).all(-1)
    face, view = ((size > 0).all(-1) & finite).nonzero(as_tuple=True)
    corners = seen[face, view]
    planes = _side_planes(corners, meshes.faces[face])
    image = meshes.face_owners[face] * cameras.shape[1] + view
    return _Boxes(
        face=face,
        image=image,
        planes=planes,
        volume=(corners[:, 0] * planes[:, 0]).sum(-1),
        half=half[face, view],
        first=first[face, view].long(),
        size=size[face, view].long(),
    )


def _side_planes(corners: Tensor, faces: Tensor) -> Tensor:
    """Normals `[K, 3, 3]` of the planes through the origin and the sides opposite to each of the corners `[K, 3, 3]`.

    Of the two faces at a side each gets exactly the other's with its sign changed: so a ray through the side is inside
    of one of them. A cross product does not promise that, because it may be computed with fused operations.
    """
    start, end = corners[:, [1, 2, 0]], corners[:, [2, 0, 1]]
    swapped = (faces[:, [1, 2, 0]] > faces[:, [2, 0, 1]])[..., None]
    normals = torch.linalg.cross(torch.where(swapped, end, start), torch.where(swapped, start, end))
    return torch.where(swapped, -normals, normals)


def _chunks(counts: Tensor) -> Iterator[slice]:
    """Runs of boxes with together at most `MOST_CANDIDATES` pixels, or of one box."""
    total, start = counts.cumsum(0), 0
    while start < len(total):
        limit = MOST_CANDIDATES + (int(total[start - 1]) if start else 0)
        end = max(int(torch.searchsorted(total, limit, right=True)), start + 1)
        yield slice(start, end)
        start = end


def _draw(boxes: _Boxes, chunk: slice, resolution: int, depth: Tensor, face: Tensor) -> None:
    """Into depth and face `[P V H H]`: where a face of the chunk is nearer, or as near and of a lower row."""
    size, first = boxes.size[chunk], boxes.first[chunk]
    counts = size.prod(-1)
    box = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    place = torch.arange(len(box), device=box.device) - (counts.cumsum(0) - counts)[box]
    width = size[box, 0]
    column, row = first[box, 0] + place % width, first[box, 1] + place // width
    half = boxes.half[chunk][box]
    x = ((column + 0.5) * (2 / resolution) - 1) * half
    y = (1 - (row + 0.5) * (2 / resolution)) * half
    planes = boxes.planes[chunk][box]
    shares = planes[..., 0] * x[:, None] + planes[..., 1] * y[:, None] - planes[..., 2]
    inside = (shares >= 0).all(1) | (shares <= 0).all(1)
    # The ray (x, y, -1) meets the plane of the face at this depth.
    at = boxes.volume[chunk][box] / shares.sum(1)
    keep = (inside & (at > NEAR) & at.isfinite()).nonzero().squeeze(1)
    box, at = box[keep], at[keep]
    pixel = (boxes.image[chunk][box] * resolution + row[keep]) * resolution + column[keep]
    nearest = depth.scatter_reduce(0, pixel, at, "amin")
    face[nearest < depth] = torch.iinfo(torch.int64).max
    depth.copy_(nearest)
    won = at == depth[pixel]
    face.scatter_reduce_(0, pixel[won], boxes.face[chunk][box[won]], "amin")


def _nvdiffrast(meshes: Meshes, cameras: Cameras, resolution: int) -> Fragments:
    """One call for all particles and views, in nvdiffrast's range mode. Not run on the machines of its authors."""
    import nvdiffrast.torch as dr

    particles, views = cameras.shape
    seen = in_camera(meshes.vertices, meshes.vertex_owners, cameras).transpose(0, 1)  # [V, N, 3]
    half = torch.tan(cameras.fovy / 2)[meshes.vertex_owners].transpose(0, 1)
    far = 1e4
    depth = -seen[..., 2]
    clip = torch.stack(
        (
            seen[..., 0] / half,
            seen[..., 1] / half,
            (depth * (far + NEAR) - 2 * far * NEAR) / (far - NEAR),
            depth,
        ),
        dim=-1,
    )
    # An image a particle and view: view v has its own copy of all vertices, and a range of the faces of view v.
    shift = torch.arange(views, device=clip.device)[:, None, None] * len(meshes.vertices)
    faces = (meshes.faces + shift).reshape(-1, 3)
    ends = torch.tensor((0, *meshes.face_ends))
    start, count = ends[:-1], ends.diff()
    ranges = torch.stack(
        [torch.stack((start + view * len(meshes.faces), count), dim=1) for view in range(views)], dim=1
    ).reshape(-1, 2)
    context = _context(str(clip.device))
    drawn, _ = dr.rasterize(
        context,
        clip.reshape(-1, 4).float().contiguous(),
        faces.int().contiguous(),
        (resolution, resolution),
        ranges=ranges.int(),
        grad_db=False,
    )
    # Row 0 is the bottom there; 0 is no triangle. Triangles of all views are counted together.
    number = drawn[..., 3].flip(1).long() - 1
    face = torch.where(number >= 0, number % max(len(meshes.faces), 1), number)
    return Fragments(face.reshape(particles, views, resolution, resolution))


def _drtk(meshes: Meshes, cameras: Cameras, resolution: int) -> Fragments:
    """One call a particle, because the images of a call share their faces. Faces that reach behind a camera may be
    missing. Not run on the machines of its authors."""
    import drtk

    particles, views = cameras.shape
    seen = in_camera(meshes.vertices, meshes.vertex_owners, cameras)
    half = torch.tan(cameras.fovy / 2)[meshes.vertex_owners]
    # There the centre of the first pixel is (0, 0), and z is positive in front of the camera.
    spots = torch.cat((to_pixels(seen, half, resolution) - 0.5, -seen[..., 2:]), dim=-1).transpose(0, 1).float()
    kept = seen.isfinite().flatten(1).all(1)[meshes.faces].all(1).nonzero().squeeze(1)
    found = torch.full((particles, views, resolution, resolution), -1, dtype=torch.int64, device=seen.device)
    vertex_starts, owners = (0, *meshes.vertex_ends), meshes.face_owners[kept]
    for particle in range(particles):
        rows = kept[owners == particle]
        if len(rows):
            first, last = vertex_starts[particle], vertex_starts[particle + 1]
            faces = (meshes.faces[rows] - first).int().contiguous()
            index = drtk.rasterize(spots[:, first:last].contiguous(), faces, resolution, resolution).long()
            found[particle] = torch.where(index >= 0, rows[index.clamp_min(0)], index)
    return Fragments(found)


@functools.lru_cache(maxsize=8)
def _context(device: str) -> object:
    import nvdiffrast.torch as dr

    return dr.RasterizeCudaContext(device=device)
