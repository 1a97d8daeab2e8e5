"""Measuring a prior: one that draws exactly its captions gets full scores, and the errors of another are found."""

import types

import pytest
import torch

from distvsd.cameras import look_at_origin
from distvsd.looking import measure_prior as measured
from distvsd.looking.labels import expected_labels
from distvsd.networks.base import Condition
from distvsd.shapes import world
from distvsd.vsd.process import Diffusion
from distvsd.vsd.rng import Purpose, generator


class Painter:
    """A prior whose samples are drawings of what the caption says; `blunder` changes labels before they are drawn."""

    def __init__(self, prompts, blunder=lambda labels: None):
        self.texts = types.SimpleNamespace(prompts=tuple(prompts))
        self.blunder = blunder
        self.seeds = []

    def latent_shape(self, resolution):
        return 48, resolution // 4, resolution // 4

    def condition(self, ids, views):
        return Condition(torch.zeros(len(ids), 1, 1))

    class denoiser:
        process = Diffusion(torch.linspace(0.9, 0.1, 10), "epsilon")

        @staticmethod
        def predict(noisy, times, condition):
            return noisy

    def sample(self, ids, count, guidance_scale, steps, seed):
        assert len(ids) == count
        self.seeds.append(seed)
        draw = generator(seed, Purpose.EVALUATE, 3)
        labels = world.sample_labels(count, draw, rooms=0.0, faces=0.0)
        for row, i in enumerate(ids):
            expected = expected_labels(self.texts.prompts[i])
            for head in ("shape", "color", "face", "wall", "floor"):
                value = getattr(expected, head)
                if value is not None:
                    getattr(labels, head)[row] = value
            if expected.wall is not None:
                labels.shape[row] = labels.color[row] = -1
        self.blunder(labels)
        cameras = world.sample_cameras(labels, draw)
        # From in front and a little above, where faces and floors are seen.
        ones = torch.ones(count)
        distance = torch.where(labels.wall >= 0, 0.1, 1.4)
        cameras = look_at_origin(
            ones * 0.25, 0.3 * (cameras.azimuth / 3.2), distance, torch.where(labels.wall >= 0, 1.2, 0.8)
        )
        return world.draw(labels, cameras, ones * 0.6, samples=2)


def measure(monkeypatch, samples, **options):
    made = []

    def load(path, prompts, *arguments, **named):
        made.append(Painter(prompts, **options))
        return made[0]

    monkeypatch.setattr(measured, "load_prior", load)
    return measured.measure_prior("anything", samples), made[0]


def test_a_perfect_prior_is_right_at_every_level(monkeypatch):
    result, painter = measure(monkeypatch, 60)
    for level in measured.levels():
        assert result[level.name]["scene"] >= 0.95
        assert all(result[level.name][head] >= 0.95 for head in level.heads), level.name
    assert result["object"]["modes_present"] >= 20
    assert result["samples"] == 60 and result["unet_ms_per_image"] >= 0
    assert len(set(painter.seeds)) == len(painter.seeds)


def test_wrong_colours_missing_faces_and_collapse_are_found(monkeypatch):
    def blunder(labels):
        solid = labels.color >= 0
        labels.color[solid] = 0
        labels.face[:] = 0

    result, _ = measure(monkeypatch, 30, blunder=blunder)
    assert result["full"]["color"] == pytest.approx(5 / 30, abs=1e-3)  # of 6 colours in turn, 1 is red
    assert result["full"]["shape"] >= 0.95 and result["full"]["face"] >= 0.95
    assert result["face"]["face"] <= 0.05
    assert result["object"]["modes_present"] <= 5 and result["object"]["total_variation"] >= 0.8


def test_every_caption_determines_the_heads_it_is_measured_on():
    for level in measured.levels():
        assert len(set(level.captions)) == len(level.captions)
        for caption in level.captions:
            assert set(level.heads) <= set(expected_labels(caption).known()), caption
    assert {len(level.captions) for level in measured.levels()} == {30, 5, 6, 1, 36}
