"""The classifier reads fresh drawings, degraded ones and other sizes; its training is repeatable."""

import dataclasses
import json
import math

import pytest
import torch

from distvsd.cameras import look_at_origin
from distvsd.errors import PriorError
from distvsd.shapes import train_classifier, world
from distvsd.shapes.augment import augment, blank_images
from distvsd.shapes.classifier import HEADS, SCENES, SHIPPED, Classifier, load_classifier
from distvsd.vsd.rng import Purpose, generator


@pytest.fixture(scope="module")
def fresh():
    draw = generator(12345, Purpose.EVALUATE, 0)
    labels = world.sample_labels(200, draw, rooms=0.2, faces=0.4)
    cameras = world.sample_cameras(labels, draw)
    return labels, cameras, world.draw(labels, cameras, torch.rand(200, generator=draw), samples=2)


def test_fresh_drawings_are_read_right(fresh):
    labels, cameras, images = fresh
    read = load_classifier().classify(images)
    room = labels.wall >= 0
    assert torch.equal(read.scene == SCENES.index("room"), room)
    for head in ("shape", "color"):
        assert (read[head] == getattr(labels, head))[~room].float().mean() >= 0.97
    assert (read.wall == labels.wall)[room].float().mean() >= 0.97
    faces = train_classifier.face_target(train_classifier.face_pixels(labels, cameras))
    decided = ~room & (faces >= 0)
    assert (read.face == faces)[decided].float().mean() >= 0.95


def test_larger_smaller_and_unclamped_images_are_read_as_well(fresh):
    labels, _, images = fresh
    solid = (labels.shape >= 0).nonzero().squeeze(1)[:60]
    classifier = load_classifier()
    for size in (48, 160):
        resized = torch.nn.functional.interpolate(images[solid], (size, size), mode="bilinear", antialias=True)
        read = classifier.classify(resized)
        assert (read.color == labels.color[solid]).float().mean() >= 0.97
        assert (read.shape == labels.shape[solid]).float().mean() >= 0.9
    read = classifier.classify(images[solid].double() * 1.1 - 0.05)
    assert (read.shape == labels.shape[solid]).float().mean() >= 0.95


def test_nothing_and_noise_are_no_objects_and_broken_values_are_read_too():
    classifier = load_classifier()
    blank = classifier.classify(blank_images(200, generator(5, Purpose.EVALUATE, 1)))
    # A plain strong colour can be the wall of a room that fills the picture, so a few are taken for rooms.
    assert (blank.scene == SCENES.index("neither")).float().mean() >= 0.9
    assert (blank.scene == SCENES.index("object")).float().mean() <= 0.01
    broken = classifier.classify(torch.full((2, 3, 64, 64), math.nan))
    assert (broken.scene == SCENES.index("neither")).all()
    assert all(values.isfinite().all() for values in broken.probabilities.values())


def test_the_shipped_weights_are_small_and_carry_their_figures():
    weights, config = SHIPPED / "model.safetensors", json.loads((SHIPPED / "config.json").read_text())
    assert weights.stat().st_size <= 700_000
    assert set(config["accuracy"]["clean"]) == set(HEADS)
    assert config["accuracy"]["clean"]["color"] >= 0.995


def test_probabilities_belong_to_the_labels_and_batching_changes_nothing():
    model = Classifier().eval()
    images = torch.rand(7, 3, 64, 64, generator=generator(0, Purpose.EVALUATE, 2))
    whole, parts = model.classify(images), model.classify(images, batch=3)
    for head, classes in HEADS.items():
        assert whole.probabilities[head].shape == (7, classes)
        torch.testing.assert_close(whole.probabilities[head].sum(-1), torch.ones(7))
        torch.testing.assert_close(whole.probabilities[head], parts.probabilities[head])
        assert torch.equal(getattr(whole, head), whole[head])
    assert model.classify(images[:0]).scene.shape == (0,)


def test_a_folder_without_a_classifier_says_how_to_train_one(tmp_path):
    with pytest.raises(PriorError, match="train_classifier"):
        load_classifier(tmp_path)


def test_a_face_counts_as_seen_in_front_absent_from_behind_and_undecided_at_the_rim():
    azimuth = torch.tensor([0.0, 180.0, 0.0]).deg2rad()
    ones = torch.ones(3)
    cameras = look_at_origin(ones * 0.1, azimuth, ones * 1.4, ones * math.radians(45))
    values = torch.zeros(3, dtype=torch.int64)
    labels = world.Labels(values, values, torch.tensor([1, 1, 0]), values - 1, values - 1)
    pixels = train_classifier.face_pixels(labels, cameras)
    assert train_classifier.face_target(pixels).tolist() == [1, 0, 0]
    few = torch.zeros(1, 64, 64, dtype=torch.bool)
    few[0, 0, :5] = True
    assert train_classifier.face_target(few).tolist() == [-1]


def test_a_floor_is_seen_looking_down_and_not_looking_up():
    # At elevation +80 degrees the camera is above and looks down, at -80 it is below and looks up at the ceiling.
    ones = torch.ones(2)
    elevation = torch.tensor([80.0, -80.0]).deg2rad()
    cameras = look_at_origin(elevation, ones * 0.2, ones * 0.1, ones * math.radians(60))
    none, zero = torch.full((2,), -1), torch.zeros(2, dtype=torch.int64)
    labels = world.Labels(none, none, zero, zero, zero + 3)
    assert (train_classifier.floor_pixels(labels, cameras).sum((1, 2)) > 0).tolist() == [True, False]


def test_degrading_keeps_what_is_there_and_draws_from_its_generator_alone():
    labels = world.Labels(*(torch.tensor([value]).expand(8) for value in (0, 0, 0, -1, -1)))
    ones = torch.ones(8)
    cameras = look_at_origin(ones * 0.2, torch.arange(8) * 0.7, ones * 1.4, ones * 0.8)
    black = world.draw(labels, cameras, torch.zeros(8), samples=1)
    opacity = (black.amax(1, keepdim=True) > 0).float()
    pool = (torch.cat((black, opacity, torch.zeros_like(opacity)), 1) * 255).byte()
    room = torch.zeros(8, dtype=torch.bool)
    first, ink = augment(pool, room, generator(0, Purpose.BUILD, 9))
    again, _ = augment(pool, room, generator(0, Purpose.BUILD, 9))
    assert torch.equal(first, again) and not ink.any()
    assert first.min() >= 0 and first.max() <= 1
    # A red sphere stays redder than green and blue in the middle of the picture.
    middle = first[:, :, 28:36, 28:36].mean((2, 3))
    assert (middle[:, 0] > middle[:, 1:].amax(1) + 0.1).all()


def test_training_is_repeatable_and_what_is_saved_is_what_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(train_classifier, "POOL_IMAGES", 40)
    monkeypatch.setattr(train_classifier, "HELD_OUT_IMAGES", 12)
    lines = []
    folders = [tmp_path / name for name in ("one", "two")]
    models = [train_classifier.train_classifier(folder, 3, 2, lines.append) for folder in folders]
    files = [(folder / "classifier" / "model.safetensors").read_bytes() for folder in folders]
    assert files[0] == files[1]
    loaded = load_classifier(folders[0] / "classifier")
    images = blank_images(3, generator(0, Purpose.BUILD, 11))
    ours, theirs = models[0].classify(images), loaded.classify(images)
    for head in HEADS:
        assert torch.equal(ours.probabilities[head], theirs.probabilities[head])
    assert any("step 2/2" in line for line in lines)
    assert {field.name for field in dataclasses.fields(ours)} == {*HEADS, "probabilities"}
