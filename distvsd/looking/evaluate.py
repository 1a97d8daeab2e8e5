"""Evaluates the particles of a run: labels against the prompt, empty and diverged particles, diversity.

Written to `evaluation.json` in the run's directory. Needs one rank only, and loads no network of the run but its
particles.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distvsd.cameras import Cameras
from distvsd.looking import diversity
from distvsd.looking.labels import (
    Expected,
    expected_labels,
    face_seen,
    in_words,
    label_accuracy,
    majority,
    view_accuracy,
)
from distvsd.looking.opened import Opened, load_particles
from distvsd.looking.views import groups, inspection, render_group
from distvsd.runtime import inside
from distvsd.runtime.paths import RunPaths
from distvsd.shapes.classifier import SCENES, Classifier, Predictions, load_classifier

# Mean opacity over all views: below the first a particle is empty, above the second it is only fog. Of 80 objects the
# largest covered 0.47 of its views; two fogs covered 0.97 and 0.98.
EMPTY_OPACITY, FOG_OPACITY = 0.01, 0.9


@dataclass(frozen=True)
class Readings:
    """One particle seen from all views: what the classifier reads, its mean opacity, whether all values are finite."""

    predictions: Predictions
    features: Tensor
    opacity: float
    finite: bool


def evaluate_run(run_dir: Path, report: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Evaluates the newest checkpoint of `run_dir`, writes `evaluation.json` there, and returns what it wrote.

    Raises what loading raises: RunError for a folder that is no run, CheckpointError where none can be read. RunError
    also where it cannot be written.
    """
    paths = RunPaths(run_dir)
    paths.prove_writable()  # before the work
    inside.expect_file(run_dir, paths.evaluation.name)
    result = evaluate_particles(load_particles(run_dir), load_classifier(), report)
    inside.write(run_dir, paths.evaluation.name, json.dumps(result, indent=2) + "\n")
    return result


def evaluate_particles(
    opened: Opened, classifier: Classifier, report: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """The content of evaluation.json: counts and shares over all particles, then one entry a particle."""
    config, ids = opened.config, list(opened.ids)
    cameras = inspection(opened)
    turns = cameras.azimuth[0].rad2deg()
    expected = {i: expected_labels(config.prompts[i]) for i in ids}
    readings = read_particles(opened, cameras, classifier, report)
    details = [_detail(i, opened, readings[i], expected[i], turns) for i in ids]
    sound = [i for i, detail in zip(ids, details, strict=True) if not detail["empty"] and not detail["diverged"]]
    found = [_labels(readings[i], turns) if i in set(sound) else {} for i in ids]
    result: dict[str, Any] = {
        "particles": len(ids),
        "views": len(turns),
        "label_accuracy": _rounded(label_accuracy(found, [expected[i] for i in ids])),
        "view_accuracy": _mean_of([detail["view_accuracy"] for detail in details]),
        "empty": sum(detail["empty"] for detail in details),
        "diverged": sum(detail["diverged"] for detail in details),
        "quarantined": sum(detail["quarantined"] for detail in details),
    }
    if sound:
        features = torch.stack([readings[i].features for i in sound])
        result["diversity"] = {
            "mean_cosine": round(diversity.mean_cosine(features), 4),
            "vendi": round(diversity.vendi_score(features.mean(1)), 3),
        }
        counts = diversity.mode_counts(found)
        result["modes"] = diversity.mode_names(counts)
        result["rooms"] = diversity.room_names(found)
        result["modes_present"] = int((counts > 0).sum())
        result["total_variation_from_uniform"] = round(diversity.total_variation(counts), 4)
    return result | {"particles_detail": details}


def read_particles(
    opened: Opened, cameras: Cameras, classifier: Classifier, report: Callable[[str], None]
) -> dict[int, Readings]:
    """Renders every particle from cameras `[1, V]` and classifies every view; by particle id."""
    readings = {}
    for group in groups(opened, opened.ids, cameras.shape[1]):
        images, opacity = render_group(opened, group, cameras)
        finite = images.isfinite().flatten(1).all(1) & opacity.isfinite().flatten(1).all(1)
        for row, i in enumerate(group):
            seen = classifier.classify(images[row]), classifier.embed(images[row])
            readings[i] = Readings(*seen, float(opacity[row].mean()), bool(finite[row]))
        report(f"read {len(readings)} of {len(opened.ids)} particles")
    return readings


def _labels(reading: Readings, turns: Tensor) -> dict[str, int]:
    """The voted labels of one particle; the face is what its front views show, or the one view of an image."""
    labels = majority(reading.predictions)
    if labels["scene"] == SCENES.index("object"):
        front, _ = face_seen(reading.predictions, turns)
        if front is not None:
            labels["face"] = int(front)
    return labels


def _detail(i: int, opened: Opened, reading: Readings, expected: Expected, turns: Tensor) -> dict[str, Any]:
    config, solid = opened.config, opened.particle.has_views
    labels = _labels(reading, turns)
    # The classifier can tell that an image is empty only for images of the shapes world.
    known_world = config.prior.path == "shapes" or bool(expected.known())
    nothing = known_world and labels["scene"] == SCENES.index("neither")
    # Inside a scene every ray ends on a wall: there a full opacity is right.
    is_inside = config.cameras.kind != "orbit" or expected.scene == SCENES.index("room")
    fog = reading.opacity > FOG_OPACITY and not is_inside
    detail: dict[str, Any] = {
        "id": i,
        "prompt": config.prompts[i],
        "labels": in_words(labels),
        "expected": in_words(expected.known()),
        "view_accuracy": _rounded(view_accuracy(reading.predictions, expected)),
        "view_scenes": [SCENES[scene] for scene in reading.predictions.scene.tolist()],
        "opacity": round(reading.opacity, 4) if math.isfinite(reading.opacity) else None,
        "diverged": not reading.finite,
        "quarantined": bool(opened.health.get(i, {}).get("quarantined", False)),
        "empty": reading.finite and ((reading.opacity < EMPTY_OPACITY or fog) if solid else nothing),
    }
    if solid and labels["scene"] == SCENES.index("object"):
        detail["face_from_behind"] = face_seen(reading.predictions, turns)[1]
    return detail


def _mean_of(accuracies: Sequence[dict[str, float]]) -> dict[str, float]:
    heads = sorted({head for accuracy in accuracies for head in accuracy})
    totals = {head: [accuracy[head] for accuracy in accuracies if head in accuracy] for head in heads}
    return _rounded({head: sum(values) / len(values) for head, values in totals.items()})


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}
