"""Pictures of surfaces by embree: one ray a pixel, the nearest hit, no light."""

import numpy
import torch
import trimesh

from distvsd.cameras import rays
from distvsd.looking.opened import Opened

EDGE = 96


def of_particle(opened: Opened, particle_id, camera, resolution, threshold, edge=EDGE):
    """Colours [E, E, 3] of the particle's own surface, as it colours the points that are hit, and what was hit."""
    parameters = {name: value[None] for name, value in opened.ensemble.parameters_of(particle_id).items()}
    with torch.no_grad():
        surface = opened.particle.surface(parameters, resolution, threshold)
        mesh = trimesh.Trimesh(*(part.numpy() for part in surface.meshes.one(0)), process=False)
        origins, directions = _rays(camera, edge)
        points, ray, _ = _hits(mesh, origins, directions)
        colors = surface.color(torch.from_numpy(points)[None].float())[0].numpy()
    return _picture(colors, ray, edge)


def of_file(path, camera, edge=EDGE):
    """The same of a GLB with one node, by what trimesh reads of it."""
    [mesh] = trimesh.load_scene(path, process=False).geometry.values()
    origins, directions = (part[:, [1, 2, 0]] for part in _rays(camera, edge))  # y up, the front toward +z
    points, ray, face = _hits(mesh, origins, directions)
    shares = trimesh.triangles.points_to_barycentric(mesh.triangles[face], points)
    if mesh.visual.uv is not None:
        at = (mesh.visual.uv[mesh.faces[face]] * shares[..., None]).sum(1)
        colors = _bilinear(numpy.asarray(mesh.visual.material.baseColorTexture.convert("RGB")) / 255, at)
    else:
        stored = mesh.visual.vertex_attributes["color"][:, :3]
        values = stored / numpy.iinfo(stored.dtype).max
        colors = _srgb((values[mesh.faces[face]] * shares[..., None]).sum(1))
    return _picture(colors, ray, edge)


def _rays(camera, edge):
    origin, directions = rays(camera, edge, edge)
    directions = directions.reshape(-1, 3).double().numpy()
    return numpy.broadcast_to(origin.double().numpy(), directions.shape), directions


def _hits(mesh, origins, directions):
    """Points, rays and faces of the nearest hits."""
    caster = trimesh.ray.ray_pyembree.RayMeshIntersector(mesh)
    points, ray, face = caster.intersects_location(origins, directions, multiple_hits=False)
    return points, ray, face


def _picture(colors, ray, edge):
    picture, hit = numpy.zeros((edge * edge, 3)), numpy.zeros(edge * edge, dtype=bool)
    picture[ray], hit[ray] = colors, True
    return picture.reshape(edge, edge, 3), hit.reshape(edge, edge)


def _bilinear(picture, at):
    """Colours at texture coordinates [K, 2], v upward as trimesh has it."""
    edge = len(picture)
    place = numpy.stack((1 - at[:, 1], at[:, 0]), axis=1) * edge - 0.5
    low = numpy.floor(place).astype(int)
    share = place - low
    total = numpy.zeros((len(at), 3))
    for row in (0, 1):
        for column in (0, 1):
            weight = numpy.abs(1 - row - share[:, 0]) * numpy.abs(1 - column - share[:, 1])
            corner = (low + numpy.array([row, column])).clip(0, edge - 1)
            total += weight[:, None] * picture[corner[:, 0], corner[:, 1]]
    return total


def _srgb(linear):
    return numpy.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
