"""The procedural world: silhouettes against geometry, faces seen from the front only, rooms, repeatable bits."""

import math

import pytest
import torch

from distvsd.cameras import look_at_origin
from distvsd.shapes import world
from distvsd.shapes.captions import caption
from distvsd.vsd.rng import Purpose, generator


def cameras(azimuths_deg, elevation_deg=0.0, distance=1.5, fovy_deg=45.0):
    azimuth = torch.tensor(azimuths_deg, dtype=torch.float32).deg2rad()
    ones = torch.ones_like(azimuth)
    return look_at_origin(ones * math.radians(elevation_deg), azimuth, ones * distance, ones * math.radians(fovy_deg))


def labels(count, **values):
    fields = {"shape": -1, "color": -1, "face": 0, "wall": -1, "floor": -1} | values
    return world.Labels(**{name: torch.full((count,), value) for name, value in fields.items()})


def drawn(azimuths_deg, background=0.5, elevation_deg=0.0, samples=2, **values):
    count = len(azimuths_deg)
    return world.draw(
        labels(count, **values),
        cameras(azimuths_deg, elevation_deg),
        torch.full((count,), background),
        samples=samples,
    )


@pytest.mark.parametrize("azimuth", [0.0, 77.0, 200.0])
def test_a_sphere_covers_the_disc_that_geometry_says(azimuth):
    image = drawn([azimuth], background=1.0, shape=0, color=2, samples=4)[0]
    # A sphere of radius r at distance d is seen within the angle asin(r / d), whose tangent is r / sqrt(d^2 - r^2);
    # half the image, 32 pixels, spans tan(fovy / 2).
    radius = 32 * world.SPHERE_RADIUS / math.sqrt(1.5**2 - world.SPHERE_RADIUS**2) / math.tan(math.radians(22.5))
    covered = (image - 1).abs().amax(0) > 0.05
    assert float(covered.sum()) == pytest.approx(math.pi * radius**2, rel=0.06)
    columns = covered.any(0).nonzero()
    assert (int(columns.min()) + int(columns.max())) / 2 == pytest.approx(31.5, abs=0.51)


def test_what_is_not_covered_is_the_background():
    image = drawn([30.0], background=0.25, shape=1, color=0)[0]
    corners = image[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    torch.testing.assert_close(corners, torch.full_like(corners, 0.25))


@pytest.mark.parametrize("shape", range(len(world.SHAPES)))
def test_a_face_is_seen_from_the_front_only(shape):
    azimuths = [0.0, 20.0, 150.0, 180.0, 210.0]
    faced, bare = (drawn(azimuths, shape=shape, color=3, face=face) for face in (1, 0))
    changed = ((faced - bare).abs().amax(1) > 0.1).sum((1, 2))
    assert changed[:2].min() > 25
    assert changed[2:].max() == 0


def test_a_face_is_dark():
    faced, bare = (drawn([0.0], shape=0, color=3, face=face)[0] for face in (1, 0))
    ink = (faced - bare).abs().amax(0) > 0.5
    assert faced[:, ink].max() < 0.3 < bare[:, ink].max()


@pytest.mark.parametrize("color", range(len(world.COLORS)))
def test_an_object_has_its_colour_up_to_the_light(color):
    image = drawn([10.0], shape=0, color=color)[0]
    middle = image[:, 28:36, 28:36].flatten(1).mean(1)
    cosine = torch.nn.functional.cosine_similarity(middle, world.RGB[color], dim=0)
    assert cosine > 0.999


def test_the_same_labels_are_drawn_with_the_same_bits_whatever_is_drawn_beside_them():
    draw = generator(1, Purpose.BUILD, 7)
    many = world.sample_labels(12, draw)
    where = world.sample_cameras(many, draw)
    grey = torch.linspace(0, 1, 12)
    together = world.draw(many, where, grey, resolution=32, samples=1)
    again = world.draw(many, where, grey, resolution=32, samples=1)
    assert torch.equal(together, again)
    for row in (0, 5, 11):
        part = slice(row, row + 1)
        alone = world.draw(many[part], where[part], grey[part], resolution=32, samples=1)
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-4)


def test_a_room_shows_its_floor_below_and_its_walls_in_the_middle():
    inside = look_at_origin(*(torch.tensor([value]) for value in (0.0, 0.3, 0.1, math.radians(80))))
    image = world.draw(labels(1, wall=0, floor=3), inside, torch.zeros(1), samples=1)[0]
    floor, wall = image[:, -1, 32], image[:, 31, 32]
    assert torch.nn.functional.cosine_similarity(floor, world.RGB[3], dim=0) > 0.999
    assert torch.nn.functional.cosine_similarity(wall, world.RGB[0], dim=0) > 0.999


def test_every_shape_and_colour_is_equally_likely_and_rooms_and_faces_have_their_shares():
    many = world.sample_labels(20_000, generator(2, Purpose.BUILD, 8), rooms=0.1, faces=0.3)
    room = many.wall >= 0
    assert room.float().mean() == pytest.approx(0.1, abs=0.01)
    assert (many.face[~room] == 1).float().mean() == pytest.approx(0.3, abs=0.015)
    assert torch.equal(many.shape < 0, room) and torch.equal(many.floor >= 0, room) and not many.face[room].any()
    for values, classes in ((many.shape[~room], 5), (many.color[~room], 6)):
        shares = values.bincount(minlength=classes) / len(values)
        torch.testing.assert_close(shares, torch.full((classes,), 1 / classes), rtol=0, atol=0.015)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((1, 0, 0, -1, -1, "full"), "a red cube"),
        ((4, 5, 1, -1, -1, "full"), "an orange torus with a face"),
        ((1, 0, 0, -1, -1, "shape"), "a cube"),
        ((1, 0, 0, -1, -1, "color"), "something red"),
        ((1, 0, 0, -1, -1, "object"), "an object"),
        ((-1, -1, 0, 0, 3, "full"), "inside a room with red walls and a yellow floor"),
        ((-1, -1, 0, 0, 5, "shape"), "inside a room with red walls and an orange floor"),
        ((-1, -1, 0, 0, 3, "object"), "inside a room"),
        ((1, 0, 1, -1, -1, "empty"), ""),
    ],
)
def test_captions_say_what_is_there(arguments, text):
    assert caption(*arguments) == text
