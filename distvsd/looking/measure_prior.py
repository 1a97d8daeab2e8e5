"""What a prior of the shapes world draws by itself, caption level by caption level, counted by the classifier."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from distvsd.looking import diversity
from distvsd.looking.labels import expected_labels
from distvsd.prior.base import Prior
from distvsd.prior.load import load_prior
from distvsd.shapes.captions import article
from distvsd.shapes.classifier import SCENES, Classifier, Predictions, load_classifier
from distvsd.shapes.world import COLORS, RESOLUTION, SHAPES
from distvsd.vsd.rng import Purpose, normal

GUIDANCE_SCALE = 3.0
STEPS = 15
BATCH = 50
UNET_BATCH, UNET_REPEATS = 8, 5


@dataclass(frozen=True)
class Level:
    """One level of captions: `captions` are used in turn, `heads` are those whose labels every caption determines.

    guided: False where the distribution itself is measured, because guidance sharpens it.
    """

    name: str
    captions: tuple[str, ...]
    heads: tuple[str, ...]
    guided: bool = True


def measure_prior(
    prior_path: str = "shapes",
    samples: int = 500,
    report: Callable[[str], None] = lambda text: None,
    guidance_scale: float = GUIDANCE_SCALE,
    steps: int = STEPS,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Draws `samples` ancestral samples for each of `levels()` and counts how many show what their caption says.

    Result: `{level: {head: share right, ...}}`, and `unet_ms_per_image` on a single core. The object level is drawn
    without guidance and has the modes present of 30 and the total variation from uniform instead. Raises PriorError
    where the prior cannot be loaded.
    """
    chosen = levels()
    captions = [caption for level in chosen for caption in level.captions]
    prior = load_prior(prior_path, captions, "", view_dependent=False, dtype=torch.float32, device=device)
    classifier = load_classifier(device=device)
    result: dict[str, Any] = {"samples": samples, "guidance_scale": guidance_scale, "steps": steps, "seed": seed}
    first = 0
    for index, level in enumerate(chosen):
        ids = [first + i % len(level.captions) for i in range(samples)]
        first += len(level.captions)
        scale = guidance_scale if level.guided else 1.0
        read = _read(prior, classifier, ids, scale, steps, seed * 1000 + index, report, level.name)
        result[level.name] = {"guidance_scale": scale} | _score(level, read)
        report(f"{level.name}: {result[level.name]}")
    return result | {"unet_ms_per_image": round(unet_milliseconds(prior), 2)}


def levels() -> tuple[Level, ...]:
    """The caption levels that are measured."""
    subjects = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    # The floor is shifted by one more in every block of 6, so 36 captions meet every pair of colours once.
    pairs = [(COLORS[i % 6], COLORS[(i + i // 6) % 6]) for i in range(36)]
    return (
        Level("full", tuple(article(subject) for subject in subjects), ("color", "shape", "face")),
        Level(
            "face",
            tuple(f"{article(subject)} with a face, front view" for subject in subjects),
            ("color", "shape", "face"),
        ),
        Level("shape", tuple(article(shape) for shape in SHAPES), ("shape",)),
        Level("color", tuple(f"something {color}" for color in COLORS), ("color",)),
        Level("object", ("an object",), (), guided=False),
        Level(
            "room",
            tuple(f"inside a room with {wall} walls and {article(floor)} floor" for wall, floor in pairs),
            ("wall", "floor"),
        ),
    )


@torch.no_grad()
def unet_milliseconds(prior: Prior) -> float:
    """Milliseconds a UNet forward takes per image, in a batch of 8 on one thread.

    The fastest of several calls, so that other work on the machine counts less.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        shape = prior.latent_shape(RESOLUTION)
        rows = torch.zeros(UNET_BATCH, dtype=torch.int64)
        condition = prior.condition(rows, rows)
        device = condition.text.device
        noisy = normal(0, Purpose.EVALUATE, list(range(UNET_BATCH)), 0, shape).to(device)
        times = prior.denoiser.process.times(torch.full((UNET_BATCH,), 0.5, device=device), 0.0, 1.0)
        best = float("inf")
        for _ in range(UNET_REPEATS):
            start = time.perf_counter()
            prior.denoiser.predict(noisy, times, condition).sum().item()
            best = min(best, time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return best * 1000 / UNET_BATCH


def _read(
    prior: Prior,
    classifier: Classifier,
    ids: list[int],
    guidance_scale: float,
    steps: int,
    seed: int,
    report: Callable[[str], None],
    name: str,
) -> list[tuple[str, dict[str, int]]]:
    """The caption of every sample and the labels read from it."""
    found = []
    for first in range(0, len(ids), BATCH):
        part = ids[first : first + BATCH]
        # Image i of a call is keyed by (seed, i), so every batch has a seed of its own.
        images = prior.sample(part, len(part), guidance_scale, steps, seed * 1000 + first // BATCH)
        found += _labels(classifier.classify(images))
        report(f"{name}: {len(found)} of {len(ids)} samples")
    return [(prior.texts.prompts[i], labels) for i, labels in zip(ids, found, strict=True)]


def _labels(predictions: Predictions) -> list[dict[str, int]]:
    """The heads that mean something in the scene each image shows."""
    heads = {"object": ("shape", "color", "face"), "room": ("wall", "floor"), "neither": ()}
    return [
        {"scene": scene} | {head: int(predictions[head][row]) for head in heads[SCENES[scene]]}
        for row, scene in enumerate(predictions.scene.tolist())
    ]


def _score(level: Level, read: list[tuple[str, dict[str, int]]]) -> dict[str, Any]:
    scene = "room" if level.name == "room" else "object"
    count = max(len(read), 1)
    score: dict[str, Any] = {}
    score["scene"] = round(sum(labels["scene"] == SCENES.index(scene) for _, labels in read) / count, 4)
    for head in level.heads:
        right = sum(labels.get(head) == expected_labels(caption).known()[head] for caption, labels in read)
        score[head] = round(right / count, 4)
    if level.name == "object":
        counts = diversity.mode_counts([labels for _, labels in read])
        score["modes_present"] = int((counts > 0).sum())
        score["total_variation"] = round(diversity.total_variation(counts), 4)
        score["counts"] = diversity.mode_names(counts)
    return score
