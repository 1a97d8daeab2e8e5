"""The labels that a prompt asks for, and the labels that the classifier reads from several views."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distvsd.shapes.classifier import HEADS, SCENES, Predictions
from distvsd.shapes.world import COLORS, SHAPES

FRONT_DEG = 30.0  # a face must be seen from cameras within this turn of the front
BACK_DEG = 100.0  # and must not be seen from beyond this one
WORDS = {
    "scene": SCENES,
    "shape": SHAPES,
    "color": COLORS,
    "face": ("no face", "face"),
    "wall": COLORS,
    "floor": COLORS,
}
_COLOR = "(" + "|".join(COLORS) + ")"
_SHAPE = "(" + "|".join(SHAPES) + ")"


@dataclass(frozen=True)
class Expected:
    """Class index of every head that the prompt determines, None where it says nothing; indices as in WORDS.

    Labels of several heads in words: `{head: WORDS[head][index]}`.
    """

    scene: int | None = None
    shape: int | None = None
    color: int | None = None
    face: int | None = None
    wall: int | None = None
    floor: int | None = None

    def known(self) -> dict[str, int]:
        """The heads the prompt determines."""
        return {head: value for head in HEADS if (value := getattr(self, head)) is not None}


def expected_labels(prompt: str) -> Expected:
    """Finds the words of the shapes world in any text; a text without them, such as `an object`, expects nothing.

    The shape is the first one named, the colour the one before it or after `something`. An object that is described
    without a face must show none; with one, a text that names another view than the front leaves the face open.
    """
    text = " ".join(re.findall(r"[a-z]+", prompt.lower()))
    if re.search(r"\binside a room\b", text):
        wall, floor = re.search(rf"\b{_COLOR} walls?\b", text), re.search(rf"\b{_COLOR} floor\b", text)
        return Expected(scene=SCENES.index("room"), wall=_index(COLORS, wall), floor=_index(COLORS, floor))
    shape = re.search(rf"\b{_SHAPE}\b", text)
    before = text[: shape.end()] if shape else text
    colored = re.findall(rf"\b{_COLOR}\b", before) if shape else re.findall(rf"\bsomething {_COLOR}\b", before)
    if not shape and not colored:
        return Expected()
    face: int | None = int("with a face" in text)
    view = re.search(r"\b(\w+) view\b", text)
    if face and view and view.group(1) != "front":
        face = None
    return Expected(
        scene=SCENES.index("object"),
        shape=_index(SHAPES, shape),
        color=COLORS.index(colored[-1]) if colored else None,
        face=face,
    )


def majority(predictions: Predictions) -> dict[str, int]:
    """The label of each head that most of the views `[V]` of one particle show; ties go to the larger probability.

    Views that show nothing do not vote on what the object is. Heads that do not belong to the voted scene are left
    out, and so is the face, which depends on the view.
    """
    scene = vote(predictions, "scene", torch.ones_like(predictions.scene, dtype=torch.bool))
    heads = {"object": ("shape", "color"), "room": ("wall", "floor")}.get(SCENES[scene], ())
    return {"scene": scene} | {head: vote(predictions, head, predictions.scene == scene) for head in heads}


def vote(predictions: Predictions, head: str, voters: Tensor) -> int:
    """The class most of the `voters` (`[V]` bool, at least one) see, by summed probability where votes are equal."""
    probabilities = predictions.probabilities[head][voters]
    votes = torch.nn.functional.one_hot(probabilities.argmax(-1), probabilities.shape[-1]).sum(0)
    return int((votes + probabilities.mean(0) * 0.5).argmax())


def face_seen(predictions: Predictions, turn_deg: Tensor) -> tuple[bool | None, bool]:
    """Whether most front views show a face (None without a front view), and whether any view from behind shows one.

    turn_deg: `[V]` azimuths in degrees, of any turn.
    """
    turn = ((turn_deg + 180) % 360 - 180).abs()
    front, back = turn < FRONT_DEG, turn > BACK_DEG
    seen = (predictions.face == 1) & (predictions.scene == SCENES.index("object"))
    return (bool(seen[front].float().mean() > 0.5) if front.any() else None), bool(seen[back].any())


def view_accuracy(predictions: Predictions, expected: Expected) -> dict[str, float]:
    """Share of the views that show each expected label; the face, which depends on the view, is left out.

    A view of another scene shows none of the labels of this one.
    """
    right_scene = torch.ones_like(predictions.scene, dtype=torch.bool)
    if expected.scene is not None:
        right_scene = predictions.scene == expected.scene
    return {
        head: float(((predictions[head] == value) & right_scene).float().mean())
        for head, value in expected.known().items()
        if head != "face"
    }


def label_accuracy(found: Sequence[Mapping[str, int]], expected: Sequence[Expected]) -> dict[str, float]:
    """Share of the particles whose label is the expected one, for each head that any prompt determines.

    A head that is missing from what was found counts as wrong.
    """
    totals: dict[str, list[int]] = {}
    for labels, wanted in zip(found, expected, strict=True):
        for head, value in wanted.known().items():
            totals.setdefault(head, []).append(int(labels.get(head) == value))
    return {head: sum(values) / len(values) for head, values in sorted(totals.items())}


def in_words(labels: Mapping[str, int]) -> dict[str, str]:
    """Class indices as words: `{"shape": 1}` is `{"shape": "cube"}`."""
    return {head: WORDS[head][value] for head, value in labels.items()}


def _index(names: Sequence[str], match: re.Match[str] | None) -> int | None:
    return names.index(match.group(1)) if match else None
