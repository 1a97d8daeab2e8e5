"""The labels that a prompt names, and the vote over views."""

import pytest
import torch

from distvsd.looking.labels import (
    Expected,
    expected_labels,
    face_seen,
    in_words,
    label_accuracy,
    majority,
    view_accuracy,
)
from distvsd.shapes.captions import every_caption
from distvsd.shapes.classifier import HEADS, Predictions


def words(prompt):
    return in_words(expected_labels(prompt).known())


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a red cube", {"scene": "object", "shape": "cube", "color": "red", "face": "no face"}),
        ("A  RED, cube!", {"scene": "object", "shape": "cube", "color": "red", "face": "no face"}),
        ("an orange torus with a face", {"scene": "object", "shape": "torus", "color": "orange", "face": "face"}),
        ("a blue cone with a face, front view", {"scene": "object", "shape": "cone", "color": "blue", "face": "face"}),
        ("a blue cone with a face, back view", {"scene": "object", "shape": "cone", "color": "blue"}),
        ("a cylinder", {"scene": "object", "shape": "cylinder", "face": "no face"}),
        ("something purple", {"scene": "object", "color": "purple", "face": "no face"}),
        ("a green sphere on a red cube", {"scene": "object", "shape": "sphere", "color": "green", "face": "no face"}),
        ("an object", {}),
        ("an object with a face", {}),
        ("", {}),
        ("inside a room", {"scene": "room"}),
        (
            "inside a room with red walls and an orange floor",
            {"scene": "room", "wall": "red", "floor": "orange"},
        ),
        ("a redwood spherical castle", {}),
        ("../../etc/passwd", {}),
        ("red " * 2500, {}),
    ],
)
def test_a_prompt_promises_what_its_words_say(prompt, wanted):
    assert words(prompt) == wanted


def test_every_caption_of_the_world_is_understood():
    for text in every_caption():
        known = words(text)
        assert all(value in text or head in ("scene", "face") for head, value in known.items()), text
        assert bool(known) == (bool(text) and "an object" not in text), text


def predictions(**rows):
    """Predictions of V views from class indices; confidence 0.9 unless a pair (class, confidence) is given."""
    count = len(next(iter(rows.values())))
    probabilities = {}
    for head, classes in HEADS.items():
        table = torch.zeros(count, classes)
        for row, value in enumerate(rows.get(head, [0] * count)):
            index, confidence = value if isinstance(value, tuple) else (value, 0.9)
            table[row] = (1 - confidence) / (classes - 1)
            table[row, index] = confidence
        probabilities[head] = table
    return Predictions(
        **{head: values.argmax(-1) for head, values in probabilities.items()}, probabilities=probabilities
    )


def test_most_views_decide_and_ties_go_to_the_surer_ones():
    read = predictions(scene=[0, 0, 0, 0], shape=[1, 1, 1, 2], color=[(3, 0.6), (3, 0.6), (4, 0.99), (4, 0.99)])
    assert majority(read) == {"scene": 0, "shape": 1, "color": 4}


def test_views_that_show_nothing_do_not_vote_on_the_object():
    read = predictions(scene=[0, 0, 0, 2, 2], shape=[1, 1, 0, 4, 4], color=[5, 5, 5, 0, 0])
    assert majority(read) == {"scene": 0, "shape": 1, "color": 5}


def test_a_room_has_walls_and_nothing_has_no_labels():
    assert majority(predictions(scene=[1, 1], wall=[2, 2], floor=[3, 3])) == {"scene": 1, "wall": 2, "floor": 3}
    assert majority(predictions(scene=[2, 2], shape=[1, 1])) == {"scene": 2}


def test_a_face_is_looked_for_in_front_and_behind():
    turns = torch.tensor([0.0, 90.0, 180.0, 270.0])
    assert face_seen(predictions(scene=[0] * 4, face=[1, 0, 0, 0]), turns) == (True, False)
    assert face_seen(predictions(scene=[0] * 4, face=[0, 1, 1, 0]), turns) == (False, True)
    assert face_seen(predictions(scene=[0] * 4, face=[1, 0, 0, 0]), turns + 360) == (True, False)
    assert face_seen(predictions(scene=[0], face=[1]), torch.tensor([180.0])) == (None, True)
    assert face_seen(predictions(scene=[2], face=[1]), torch.tensor([0.0])) == (False, False)


def test_view_accuracy_counts_the_views_and_those_of_another_scene_are_wrong():
    read = predictions(scene=[0, 0, 0, 2], shape=[1, 1, 3, 1], color=[0, 0, 0, 0])
    assert view_accuracy(read, expected_labels("a red cube")) == {"scene": 0.75, "shape": 0.5, "color": 0.75}
    assert view_accuracy(read, expected_labels("an object")) == {}


def test_label_accuracy_averages_over_the_particles_whose_prompt_says_something():
    expected = [Expected(scene=0, shape=1, color=0), Expected(scene=0, color=2), Expected()]
    found = [{"scene": 0, "shape": 1, "color": 3}, {"scene": 0, "shape": 0, "color": 2}, {"scene": 2}]
    assert label_accuracy(found, expected) == {"scene": 1.0, "shape": 1.0, "color": 0.5}
    assert label_accuracy([{}, {}, {}], expected) == {"scene": 0.0, "shape": 0.0, "color": 0.0}
    assert label_accuracy([], []) == {}
