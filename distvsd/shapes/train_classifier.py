"""Trains the classifier of the shapes world on freshly drawn, degraded images, and measures it on others."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from distvsd.cameras import Cameras
from distvsd.shapes import world
from distvsd.shapes.augment import augment, blank_images
from distvsd.shapes.classifier import HEADS, SCENES, Classifier, Predictions
from distvsd.vsd.rng import Purpose, generator, seeded

POOL_IMAGES = 6_000
HELD_OUT_IMAGES = 1_000
CENTER_IMAGES = 1_000
BATCH = 64
LEARNING_RATE = 2.5e-3
BLANK_SHARE = 0.12  # of every training batch is without an object
VISIBLE_PIXELS = 12  # faces and floors count as visible if they change more pixels than this, faces as absent at none
VISIBLE_CHANGE = 0.1
FACE_OVERSAMPLING = 3.0
INK_SHARE = 0.05  # of a cell of the last map from which it counts as inked
INK_WEIGHT = 5.0  # of inked cells, which are rare, against others
INK_IMPORTANCE = 15.0  # of the ink against one label


def train_classifier(
    folder: Path, seed: int = 0, steps: int = 1300, report: Callable[[str], None] = print
) -> Classifier:
    """Trains on freshly drawn images and writes `folder/classifier`; deterministic for one machine and thread count.

    Accuracies on other fresh drawings, clean and degraded, are measured at the end and written into config.json.
    """
    start = time.monotonic()
    pool, targets = _draw_pool(POOL_IMAGES, generator(seed, Purpose.BUILD, 100), report)
    with seeded(seed, Purpose.BUILD, 101):
        model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-2)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.15)
    recent: list[float] = []
    for step in range(steps):
        loss = _loss(model, *_batch(pool, targets, generator(seed, Purpose.BUILD, 102, step)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plan.step()
        recent.append(float(loss.detach()))
        if (step + 1) % 100 == 0 or step + 1 == steps:
            seconds = time.monotonic() - start
            report(f"classifier step {step + 1}/{steps}  loss {sum(recent) / len(recent):.4f}  {seconds:.0f} s")
            recent.clear()
    with torch.no_grad():
        objects = pool[targets["shape"] >= 0][:CENTER_IMAGES]
        model.center.copy_(model.features(_composed(objects, torch.tensor(0.5))).mean(0))
    model.half().float()  # measure the weights that are saved
    model.eval()
    accuracy = measure_classifier(model, seed, HELD_OUT_IMAGES, report)
    _save(model, folder / "classifier", {"seed": seed, "steps": steps, "accuracy": accuracy})
    return model


def measure_classifier(
    model: Classifier, seed: int, count: int, report: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Accuracy of every head on `count` drawings that no training saw: `clean` as drawn, `degraded` as augmented."""
    drawn, targets = _draw_pool(count, generator(seed, Purpose.BUILD, 103), report)
    draw = generator(seed, Purpose.BUILD, 104)
    background = torch.rand(count, 1, 1, 1, generator=draw)
    accuracy = {
        "clean": _accuracy(model.classify(_composed(drawn, background)), targets),
        "degraded": _accuracy(model.classify(augment(drawn, targets["wall"] >= 0, draw)[0]), targets),
    }
    blank = model.classify(blank_images(count // 4, draw))
    accuracy["blank"] = {"scene": round(float((blank.scene == SCENES.index("neither")).float().mean()), 4)}
    for kind, heads in accuracy.items():
        report(f"classifier on {kind} drawings: " + ", ".join(f"{head} {value:.2%}" for head, value in heads.items()))
    return accuracy


def face_pixels(labels: world.Labels, cameras: Cameras) -> Tensor:
    """Where a face is seen, bool `[B, 64, 64]`: the pixels in which a drawing with it differs from one without."""
    return _changed(labels, replace(labels, face=torch.zeros_like(labels.face)), labels.face > 0, cameras)


def floor_pixels(labels: world.Labels, cameras: Cameras) -> Tensor:
    """Where a room's floor is seen, bool `[B, 64, 64]`: the pixels that another colour of it changes."""
    other = replace(labels, floor=(labels.floor + 1) % len(world.COLORS))
    return _changed(labels, other, labels.floor >= 0, cameras)


def _changed(labels: world.Labels, other: world.Labels, chosen: Tensor, cameras: Cameras) -> Tensor:
    """The pixels in which drawings of `labels` and `other` differ, bool `[B, 64, 64]`; none unless `chosen` `[B]`."""
    changed = torch.zeros(len(chosen), world.RESOLUTION, world.RESOLUTION, dtype=torch.bool)
    rows = chosen.nonzero().squeeze(1)
    if len(rows):
        grey = torch.full((len(rows),), 0.5)
        one, two = (world.draw(each[rows], cameras[rows], grey, samples=2) for each in (labels, other))
        changed[rows] = (one - two).abs().amax(1) > VISIBLE_CHANGE
    return changed


def face_target(pixels: Tensor) -> Tensor:
    """From `face_pixels` `[B, 64, 64]`: 1 where a face is seen, 0 where none is, -1 where barely; int64 `[B]`."""
    count = pixels.sum((1, 2))
    return torch.where(count > VISIBLE_PIXELS, 1, -(count > 0).long())


def _draw_pool(count: int, draw: torch.Generator, report: Callable[[str], None]) -> tuple[Tensor, dict[str, Tensor]]:
    """Layers uint8 `[N, 5, 64, 64]` as `augment` takes them, and the target of every head `[N]` (-1: no loss)."""
    labels = world.sample_labels(count, draw, rooms=0.15, faces=0.5)
    cameras = world.sample_cameras(labels, draw)
    pool, faces, floors, start = [], [], [], time.monotonic()
    for first in range(0, count, 200):
        part = slice(first, first + 200)
        black, white = (
            world.draw(labels[part], cameras[part], torch.full_like(labels.shape[part], level).float(), samples=2)
            for level in (0, 1)
        )
        # Drawn before black and before white, the pictures differ by what shines through.
        opacity = 1 - (white - black).mean(1, keepdim=True)
        ink = face_pixels(labels[part], cameras[part])
        pool.append((torch.cat((black, opacity, ink[:, None].float()), dim=1).clamp(0, 1) * 255).round().byte())
        faces.append(face_target(ink))
        floors.append(floor_pixels(labels[part], cameras[part]).sum((1, 2)) > VISIBLE_PIXELS)
        if first % 2000 == 0:
            report(f"drawn {first} of {count} images, {time.monotonic() - start:.0f} s")
    room = labels.wall >= 0
    face = torch.cat(faces).where(~room, torch.full_like(labels.face, -1))
    floor = labels.floor.where(torch.cat(floors), torch.full_like(labels.floor, -1))
    targets = {"scene": room.long(), "shape": labels.shape, "color": labels.color, "face": face}
    return torch.cat(pool), targets | {"wall": labels.wall, "floor": floor}


def _composed(pool: Tensor, background: Tensor) -> Tensor:
    """The drawings before a grey background (broadcast), float `[N, 3, 64, 64]`."""
    pixels = pool.float() / 255
    return pixels[:, :3] + (1 - pixels[:, 3:4]) * background


def _batch(pool: Tensor, targets: dict[str, Tensor], draw: torch.Generator) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Degraded images of one step with their targets, and where there is ink `[N, 1, 64, 64]`."""
    num_blank = round(BLANK_SHARE * BATCH)
    weights = torch.where(targets["face"] == 1, FACE_OVERSAMPLING, 1.0)
    pick = torch.multinomial(weights, BATCH - num_blank, replacement=True, generator=draw)
    chosen = {head: values[pick] for head, values in targets.items()}
    images, ink = augment(pool[pick], chosen["wall"] >= 0, draw)
    blank = {head: torch.full((num_blank,), -1) for head in HEADS}
    blank["scene"] = torch.full((num_blank,), SCENES.index("neither"))
    batch = {head: torch.cat((chosen[head], blank[head])) for head in HEADS}
    ink = torch.cat((ink, torch.zeros(num_blank, *ink.shape[1:])))
    return torch.cat((images, blank_images(num_blank, draw))), batch, ink


def _loss(model: Classifier, images: Tensor, targets: dict[str, Tensor], ink: Tensor) -> Tensor:
    """Sum of the heads' cross-entropies, each averaged over the images with that label, plus that of the ink.

    Faces have few pixels. From one label an image the trunk does not learn them in hundreds of steps; with the cells of
    its last map that hold ink as targets it does at once.
    """
    maps = model.maps(images)
    losses = []
    for head, logits in model.read(maps).items():
        total = functional.cross_entropy(logits, targets[head], ignore_index=-1, reduction="sum")
        losses.append(total / (targets[head] >= 0).sum().clamp_min(1))
    cells = (functional.adaptive_avg_pool2d(ink, (maps.shape[-2], maps.shape[-1])) > INK_SHARE).float()
    surprise = functional.binary_cross_entropy_with_logits(model.ink(maps), cells, pos_weight=torch.tensor(INK_WEIGHT))
    return torch.stack(losses).sum() + INK_IMPORTANCE * surprise


def _accuracy(predictions: Predictions, targets: dict[str, Tensor]) -> dict[str, float]:
    scores = {}
    for head in HEADS:
        known = targets[head] >= 0
        scores[head] = round(float((predictions[head][known] == targets[head][known]).float().mean()), 4)
    return scores


def _save(model: Classifier, folder: Path, facts: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.half().contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors"
    )
    classes: dict[str, object] = {"scene": SCENES, "shape": world.SHAPES, "face": ("none", "visible")}
    classes |= dict.fromkeys(("color", "wall", "floor"), world.COLORS)
    config = {"resolution": world.RESOLUTION, "channels": model.channels, "classes": classes} | facts
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
