"""Evaluating and rendering runs whose particles are known: drawings of the world stand in for trained fields."""

import dataclasses
import json
import math

import pytest
import torch

from distvsd.cameras import OrbitSampler
from distvsd.config import CamerasConfig, Config, ParticlesConfig, PriorConfig
from distvsd.config.schedule import Schedule
from distvsd.looking import evaluate, views
from distvsd.looking.evaluate import evaluate_particles
from distvsd.looking.render import render_particles
from distvsd.looking.views import groups, inspection, render_group
from distvsd.run.parts import make_cameras, make_particle
from distvsd.shapes import world
from distvsd.shapes.classifier import load_classifier

ROOMS = ("red walls and a blue floor", "yellow walls and an orange floor")


class Drawings:
    """Particles that are drawn by the world: `labels[i]` is (shape, colour, face), or (wall, floor) for a room, or None
    for nothing at all."""

    def __init__(self, labels, prompts, kind="nerf", opacities=None):
        self.labels = labels
        self.ids = list(range(len(labels)))
        self.opacities = opacities or {}
        self.calls = []
        self.health = {}
        self.config = Config(
            prompt=tuple(prompts),
            prior=PriorConfig(path="shapes"),
            particles=ParticlesConfig(kind=kind, count=len(labels)),
            cameras=CamerasConfig(distance=(1.3, 1.5), fovy=(40.0, 50.0)),
        )
        self.particle = make_particle(self.config, None, torch.device("cpu"))
        self.sampler = OrbitSampler(self.config.cameras)

    def render(self, ids, cameras, resolution, background):
        assert cameras.shape[0] == len(ids)
        self.calls.append(tuple(cameras.shape))
        images = torch.full((*cameras.shape, 3, resolution, resolution), background)
        opacity = torch.zeros(*cameras.shape, 1, resolution, resolution)
        for row, i in enumerate(ids):
            if self.labels[i] is None:
                opacity[row] = self.opacities.get(i, 0.0)
                images[row] *= self.opacities.get(i, 1.0)
                continue
            count = cameras.shape[1]
            values = self.labels[i]
            numbers = (-1, -1, 0, *values) if len(values) == 2 else (*values, -1, -1)
            labels = world.Labels(*(torch.full((count,), number) for number in numbers))
            images[row] = world.draw(labels, cameras[row], torch.full((count,), background), resolution, samples=1)
            opacity[row] = (images[row] != background).any(1, keepdim=True).float()
        return images, opacity


@pytest.fixture(scope="module")
def classifier():
    return load_classifier()


def test_known_particles_get_their_labels_and_mistakes_are_counted(classifier):
    particles = Drawings([(1, 0, 0), (0, 2, 0), (3, 1, 1)], ["a red cube", "a blue cube", "a green cone with a face"])
    result = evaluate_particles(particles, classifier)
    assert result["particles"] == 3 and result["views"] == 8
    assert result["label_accuracy"] == {"scene": 1.0, "shape": round(2 / 3, 4), "color": 1.0, "face": 1.0}
    assert result["empty"] == 0 and result["diverged"] == 0
    assert result["modes"] == {"red cube": 1, "green cone": 1, "blue sphere": 1}
    first, second, third = result["particles_detail"]
    assert first["labels"] == {"scene": "object", "shape": "cube", "color": "red", "face": "no face"}
    assert first["view_accuracy"]["color"] == 1.0
    assert second["labels"]["shape"] == "sphere" and second["expected"]["shape"] == "cube"
    assert third["labels"]["face"] == "face" and not third["face_from_behind"]
    json.dumps(result, allow_nan=False)


def test_nothing_and_fog_are_empty_and_broken_values_are_diverged(classifier):
    particles = Drawings([None, None, None, (1, 0, 0)], ["a red cube"] * 4, opacities={1: 0.95, 2: math.nan})
    result = evaluate_particles(particles, classifier)
    assert [detail["empty"] for detail in result["particles_detail"]] == [True, True, False, False]
    assert [detail["diverged"] for detail in result["particles_detail"]] == [False, False, True, False]
    assert result["empty"] == 2 and result["diverged"] == 1
    assert result["label_accuracy"]["color"] == 0.25
    json.dumps(result, allow_nan=False)


def test_an_opaque_view_is_no_fog_where_cameras_are_inside(classifier):
    home = Drawings([None], ["inside of a smart home"], opacities={0: 1.0})
    assert evaluate_particles(home, classifier)["empty"] == 1
    home.config = dataclasses.replace(home.config, cameras=CamerasConfig(kind="scene"))
    assert evaluate_particles(home, classifier)["empty"] == 0


def test_a_prompt_without_labels_expects_none_and_diversity_is_measured(classifier):
    same = evaluate_particles(Drawings([(1, 0, 0)] * 3, ["an object"] * 3), classifier)
    mixed = evaluate_particles(Drawings([(1, 0, 0), (0, 2, 0), (4, 3, 0)], ["an object"] * 3), classifier)
    assert same["label_accuracy"] == {} and mixed["label_accuracy"] == {}
    assert same["modes_present"] == 1 and mixed["modes_present"] == 3
    assert same["diversity"]["vendi"] == pytest.approx(1, abs=0.01)
    assert 1.5 < mixed["diversity"]["vendi"] <= 3.001
    assert mixed["diversity"]["mean_cosine"] < same["diversity"]["mean_cosine"]


def test_rooms_are_read_from_inside(classifier):
    """Red walls and a blue floor as asked, and a green floor where an orange one was asked for."""
    rooms = Drawings([(0, 2), (3, 1)], [f"inside a room with {colors}" for colors in ROOMS])
    rooms.sampler = make_cameras(CamerasConfig(kind="adaptive", fovy=(60.0, 80.0)))
    result = evaluate_particles(rooms, classifier)
    assert result["view_accuracy"] == {"scene": 1.0, "wall": 1.0, "floor": 0.5}
    assert result["label_accuracy"] == {"scene": 1.0, "wall": 1.0, "floor": 0.5}
    assert result["rooms"] == {"red walls, blue floor": 1, "yellow walls, green floor": 1} and result["modes"] == {}
    assert result["empty"] == 0


def test_images_have_one_view_and_are_empty_when_nothing_is_recognised(classifier):
    particles = Drawings([(1, 0, 0), None], ["an object"] * 2, kind="image", opacities={1: 1.0})
    result = evaluate_particles(particles, classifier)
    assert result["views"] == 1
    assert [detail["empty"] for detail in result["particles_detail"]] == [False, True]


def test_evaluation_is_written_beside_the_run(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_particles", lambda folder: Drawings([(1, 0, 0)], ["a red cube"]))
    result = evaluate.evaluate_run(tmp_path)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == result
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


def test_the_views_are_a_ring_at_the_middle_of_the_ranges():
    cameras = inspection(Drawings([None], ["x"]))
    torch.testing.assert_close(cameras.azimuth[0].rad2deg(), torch.arange(8) * 45.0)
    torch.testing.assert_close(cameras.extrinsics[0, :, :3, 3].norm(dim=-1), torch.full((8,), 1.4))
    torch.testing.assert_close(cameras.fovy[0].rad2deg(), torch.full((8,), 45.0))
    torch.testing.assert_close(cameras.elevation[0].rad2deg(), torch.full((8,), 15.0))


def test_rendering_in_parts_is_rendering_at_once(monkeypatch):
    particles = Drawings([(1, 0, 0), (0, 2, 0), (2, 4, 0)], ["a"] * 3)
    cameras = inspection(particles)
    views_cost = 64 * 64 * particles.config.particles.nerf.samples_per_ray
    monkeypatch.setattr(views, "POINTS_AT_ONCE", 100 * views_cost)
    (everyone,) = groups(particles, particles.ids, 8)
    whole, opacity = render_group(particles, everyone, cameras)
    monkeypatch.setattr(views, "POINTS_AT_ONCE", 3 * views_cost)
    particles.calls.clear()
    parts = [render_group(particles, group, cameras) for group in groups(particles, particles.ids, 8)]
    assert particles.calls == [(1, 3), (1, 3), (1, 2)] * 3
    assert torch.equal(torch.cat([images for images, _ in parts]), whole)
    assert torch.equal(torch.cat([shares for _, shares in parts]), opacity)
    monkeypatch.setattr(views, "POINTS_AT_ONCE", 17 * views_cost)
    assert list(groups(particles, particles.ids, 8)) == [[0, 1], [2]]


def test_rendering_a_run_writes_a_sheet_and_a_turntable_each(tmp_path):
    particles = Drawings([(1, 0, 0), None], ["a red cube", "an object"])
    particles.config = dataclasses.replace(
        particles.config,
        render=dataclasses.replace(particles.config.render, resolution=Schedule.constant(32)),
    )
    paths = render_particles(particles, tmp_path)
    assert [path.name for path in paths] == ["contact-sheet.png", "particle-000000.mp4", "particle-000001.mp4"]
    assert all(path.stat().st_size > 0 for path in paths)


def test_many_particles_share_turntables_that_show_all_of_them_and_images_have_none(tmp_path, monkeypatch):
    monkeypatch.setattr("distvsd.looking.render.SINGLE_TURNTABLES", 2)
    monkeypatch.setattr("distvsd.looking.render.SHEET_ROWS", 2)
    monkeypatch.setattr("distvsd.looking.render.FRAMES", 4)
    for name in ("many", "more", "images"):
        (tmp_path / name).mkdir()
    paths = render_particles(Drawings([None] * 3, ["a"] * 3), tmp_path / "many")
    sheets = ["contact-sheet-000.png", "contact-sheet-001.png"]
    assert [path.name for path in paths] == [*sheets, "turntable.mp4"]
    monkeypatch.setattr("distvsd.looking.render.MOSAIC_PARTICLES", 2)
    paths = render_particles(Drawings([None] * 3, ["a"] * 3), tmp_path / "more")
    assert [path.name for path in paths] == [*sheets, "turntable-000.mp4", "turntable-001.mp4"]
    paths = render_particles(Drawings([None] * 3, ["a"] * 3, kind="image"), tmp_path / "images")
    assert [path.name for path in paths] == ["contact-sheet.png"]
