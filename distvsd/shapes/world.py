"""The procedural world of the embedded prior: solid objects and rooms, drawn by ray casting.

Everything has a label, so that particles can be counted by shape, colour, face, wall and floor colour. Sizes are in
world units; objects fit into a ball of radius 0.5 around the origin. Ray casting is vectorised over images and pixels,
in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distvsd.cameras import Cameras, look_at_origin, rays

SHAPES = ("sphere", "cube", "cylinder", "cone", "torus")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
RGB = torch.tensor(
    [
        [0.85, 0.10, 0.10],
        [0.10, 0.65, 0.15],
        [0.12, 0.25, 0.90],
        [0.92, 0.85, 0.10],
        [0.55, 0.12, 0.70],
        [0.95, 0.50, 0.05],
    ]
)
RESOLUTION = 64
ELEVATION_DEG = (-10.0, 60.0)
DISTANCE = (1.2, 1.5)
FOVY_DEG = (40.0, 50.0)
ROOM_ELEVATION_DEG = (-20.0, 20.0)
ROOM_FOVY_DEG = (60.0, 80.0)

LIGHT = torch.nn.functional.normalize(torch.tensor([0.45, 0.30, 0.85]), dim=0)  # one light, fixed in the world
AMBIENT = 0.5
INK = 0.04  # brightness of eyes and mouth
SPHERE_RADIUS, CUBE_HALF = 0.36, 0.27
CYLINDER_RADIUS, CYLINDER_HALF = 0.25, 0.34
CONE_RADIUS, CONE_TOP, CONE_BOTTOM = 0.36, 0.42, -0.32
TORUS_RADIUS, TORUS_TUBE = 0.27, 0.14
# Faces are as large as the slimmest shapes, cone and torus, allow: 130 to 300 of the 4,096 pixels from the front.
EYE_SIDE, EYE_HEIGHT, EYE_RADIUS = 0.1, 0.05, 0.065
MOUTH_HEIGHT, MOUTH_HALF_WIDTH, MOUTH_HALF_HEIGHT = -0.09, 0.14, 0.035
ROOM_HALF, ROOM_BOTTOM, ROOM_TOP = 1.0, -0.6, 0.8


@dataclass(frozen=True)
class Labels:
    """What is in each image, `[B]` int64 each. `shape` is -1 in rooms; `wall` and `floor` are -1 outside rooms.

    shape: index into SHAPES. color: index into COLORS (objects). face: 0 or 1. wall, floor: indices into COLORS.
    """

    shape: Tensor
    color: Tensor
    face: Tensor
    wall: Tensor
    floor: Tensor

    def __getitem__(self, index: object) -> Labels:
        return Labels(*(getattr(self, name)[index] for name in ("shape", "color", "face", "wall", "floor")))


def sample_labels(count: int, generator: torch.Generator, rooms: float = 0.1, faces: float = 0.5) -> Labels:
    """Independent labels: every shape and colour equally likely; shares `rooms` and `faces` of the images have them."""

    def draw(high: int) -> Tensor:
        return torch.randint(high, (count,), generator=generator)

    def chance(share: float) -> Tensor:
        return torch.rand(count, generator=generator) < share

    room, face = chance(rooms), chance(faces)
    shape, color, wall, floor = draw(len(SHAPES)), draw(len(COLORS)), draw(len(COLORS)), draw(len(COLORS))
    none = torch.full_like(shape, -1)
    return Labels(
        shape.where(~room, none),
        color.where(~room, none),
        (face & ~room).long(),
        wall.where(room, none),
        floor.where(room, none),
    )


def sample_cameras(labels: Labels, generator: torch.Generator) -> Cameras:
    """One random camera an image: around the object, or inside the room looking out."""
    count = labels.shape.shape[0]

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    azimuth = uniform(-math.pi, math.pi)
    outside = look_at_origin(
        uniform(*map(math.radians, ELEVATION_DEG)), azimuth, uniform(*DISTANCE), uniform(*map(math.radians, FOVY_DEG))
    )
    # Inside a room the camera is close to the centre and looks past it at the far wall.
    inside = look_at_origin(
        uniform(*map(math.radians, ROOM_ELEVATION_DEG)),
        azimuth,
        uniform(0.0, 0.3),
        uniform(*map(math.radians, ROOM_FOVY_DEG)),
    )
    room = labels.wall >= 0
    pick = room[:, None, None]
    return Cameras(
        inside.extrinsics.where(pick, outside.extrinsics),
        inside.fovy.where(room, outside.fovy),
        inside.elevation.where(room, outside.elevation),
        azimuth,
    )


def draw(
    labels: Labels, cameras: Cameras, background: Tensor, resolution: int = RESOLUTION, samples: int = 3
) -> Tensor:
    """Images `[B, 3, resolution, resolution]` in [0, 1], anti-aliased by `samples`^2 rays a pixel.

    background: `[B]` grey level in [0, 1] behind objects (rooms have none).
    """
    origins, directions = rays(cameras, resolution * samples, resolution * samples)
    origins = origins[:, None, None].expand_as(directions)
    color = background[:, None, None, None].expand_as(directions).clone()
    for index in range(len(SHAPES)):
        chosen = (labels.shape == index).nonzero().squeeze(1)
        if len(chosen):
            color[chosen] = _draw_objects(index, labels[chosen], origins[chosen], directions[chosen], color[chosen])
    rooms = (labels.wall >= 0).nonzero().squeeze(1)
    if len(rooms):
        color[rooms] = _draw_rooms(labels[rooms], origins[rooms], directions[rooms])
    return torch.nn.functional.avg_pool2d(color.permute(0, 3, 1, 2), samples).clamp(0, 1)


def _draw_objects(shape: int, labels: Labels, origins: Tensor, directions: Tensor, background: Tensor) -> Tensor:
    depth, normals = (_sphere, _cube, _cylinder, _cone, _torus)[shape](origins, directions)
    hit = torch.isfinite(depth)
    points = origins + directions * depth.where(hit, torch.zeros_like(depth))[..., None]
    albedo = RGB[labels.color][:, None, None].expand_as(points)
    ink = (_face_mask(points, normals) & (labels.face > 0)[:, None, None])[..., None]
    albedo = torch.where(ink, torch.full_like(albedo, INK), albedo)
    shading = AMBIENT + (1 - AMBIENT) * (normals @ LIGHT).clamp_min(0)
    return torch.where(hit[..., None], albedo * shading[..., None], background)


def _face_mask(points: Tensor, normals: Tensor) -> Tensor:
    """Two eyes and a mouth on the side that looks along +x."""
    x, y, z = points.unbind(-1)
    # Within 60 degrees of the front, so that a face on a slim cone is not visible from behind.
    front = (x > 0.05) & (normals[..., 0] > 0.5)
    eyes = ((y.abs() - EYE_SIDE) ** 2 + (z - EYE_HEIGHT) ** 2) < EYE_RADIUS**2
    mouth = (y.abs() < MOUTH_HALF_WIDTH) & ((z - MOUTH_HEIGHT).abs() < MOUTH_HALF_HEIGHT)
    return front & (eyes | mouth)


def _nearest(candidates: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The nearest of several surfaces; depth is infinite where a ray misses."""
    depth, normals = candidates[0]
    for other_depth, other_normals in candidates[1:]:
        closer = other_depth < depth
        normals = torch.where(closer[..., None], other_normals, normals)
        depth = torch.minimum(depth, other_depth)
    return depth, normals


def _entry(t: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid & (t > 1e-4), t, torch.full_like(t, math.inf))


def _sphere(o: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    b = (o * d).sum(-1)
    disc = b * b - (o * o).sum(-1) + SPHERE_RADIUS**2
    depth = _entry(-b - disc.clamp_min(0).sqrt(), disc > 0)
    points = o + d * depth.nan_to_num(posinf=0.0)[..., None]
    return depth, points / SPHERE_RADIUS


def _cube(o: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    safe = torch.where(d.abs() < 1e-9, torch.full_like(d, 1e-9), d)
    near = torch.minimum((-CUBE_HALF - o) / safe, (CUBE_HALF - o) / safe)
    far = torch.maximum((-CUBE_HALF - o) / safe, (CUBE_HALF - o) / safe)
    t, axis = near.max(-1)
    normals = torch.nn.functional.one_hot(axis, 3).to(d.dtype) * -d.sign()
    return _entry(t, t < far.min(-1).values), normals


def _disc(o: Tensor, d: Tensor, height: float, radius: float, up: float) -> tuple[Tensor, Tensor]:
    dz = torch.where(d[..., 2].abs() < 1e-9, torch.full_like(d[..., 2], 1e-9), d[..., 2])
    t = (height - o[..., 2]) / dz
    points = o + d * t[..., None]
    inside = points[..., 0] ** 2 + points[..., 1] ** 2 < radius**2
    return _entry(t, inside), torch.tensor([0.0, 0.0, up]).expand_as(o)


def _cylinder(o: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    a = (d[..., :2] ** 2).sum(-1).clamp_min(1e-9)
    b = (o[..., :2] * d[..., :2]).sum(-1)
    disc = b * b - a * ((o[..., :2] ** 2).sum(-1) - CYLINDER_RADIUS**2)
    t = (-b - disc.clamp_min(0).sqrt()) / a
    points = o + d * t[..., None]
    side = _entry(t, (disc > 0) & (points[..., 2].abs() < CYLINDER_HALF))
    normals = torch.cat((points[..., :2] / CYLINDER_RADIUS, torch.zeros_like(points[..., :1])), -1)
    top = _disc(o, d, CYLINDER_HALF, CYLINDER_RADIUS, 1.0)
    bottom = _disc(o, d, -CYLINDER_HALF, CYLINDER_RADIUS, -1.0)
    return _nearest([(side, normals), top, bottom])


def _cone(o: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    slope = CONE_RADIUS / (CONE_TOP - CONE_BOTTOM)
    weights = torch.tensor([1.0, 1.0, -(slope**2)])
    apex = o - torch.tensor([0.0, 0.0, CONE_TOP])
    a = (d * d * weights).sum(-1)
    a = torch.where(a.abs() < 1e-9, torch.full_like(a, 1e-9), a)
    b = (apex * d * weights).sum(-1)
    disc = b * b - a * (apex * apex * weights).sum(-1)
    root = disc.clamp_min(0).sqrt()
    sides = []
    for t in ((-b - root) / a, (-b + root) / a):
        points = o + d * t[..., None]
        on_cone = (disc > 0) & (points[..., 2] < CONE_TOP) & (points[..., 2] > CONE_BOTTOM)
        radial = points[..., :2] / points[..., :2].norm(dim=-1, keepdim=True).clamp_min(1e-9)
        normals = torch.cat((radial, torch.full_like(points[..., :1], slope)), -1) / math.sqrt(1 + slope**2)
        sides.append((_entry(t, on_cone), normals))
    return _nearest([*sides, _disc(o, d, CONE_BOTTOM, CONE_RADIUS, -1.0)])


def _torus(o: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    # Sphere tracing: with an exact distance function the steps never overshoot.
    t = torch.zeros_like(o[..., 0])
    for _ in range(40):
        t = t + _torus_distance(o + d * t[..., None])
    points = o + d * t[..., None]
    ring = points[..., :2] / points[..., :2].norm(dim=-1, keepdim=True).clamp_min(1e-9) * TORUS_RADIUS
    centre = torch.cat((ring, torch.zeros_like(points[..., :1])), -1)
    return _entry(t, (_torus_distance(points) < 2e-3) & (t < 4)), (points - centre) / TORUS_TUBE


def _torus_distance(points: Tensor) -> Tensor:
    ring = points[..., :2].norm(dim=-1) - TORUS_RADIUS
    return torch.hypot(ring, points[..., 2]) - TORUS_TUBE


def _draw_rooms(labels: Labels, origins: Tensor, directions: Tensor) -> Tensor:
    low = torch.tensor([-ROOM_HALF, -ROOM_HALF, ROOM_BOTTOM])
    high = torch.tensor([ROOM_HALF, ROOM_HALF, ROOM_TOP])
    # From inside a box each ray leaves through the nearest of its three far planes.
    safe = torch.where(directions.abs() < 1e-9, torch.full_like(directions, 1e-9), directions)
    axis = torch.maximum((low - origins) / safe, (high - origins) / safe).argmin(-1)
    up = (axis == 2) & (safe[..., 2] > 0)
    down = (axis == 2) & (safe[..., 2] < 0)
    wall = RGB[labels.wall][:, None, None].expand_as(origins)
    floor = RGB[labels.floor][:, None, None].expand_as(origins)
    # The two pairs of walls have different shades, so corners are visible.
    shade = torch.where(axis == 0, 0.95, 0.75)[..., None]
    color = torch.where(down[..., None], floor * 0.9, wall * shade)
    return torch.where(up[..., None], torch.full_like(color, 0.9), color)
