"""Reads the labels of the shapes world back from images: renders of particles, samples of the prior, drawings.

A small convolutional network with one head a label. It is used for evaluation only, never by the training of particles.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from distvsd.cameras import Cameras
from distvsd.errors import PriorError
from distvsd.prior.shapes import world
from distvsd.prior.shapes.augment import augment, blank_images
from distvsd.vsd.rng import Purpose, generator, seeded

SCENES = ("object", "room", "neither")
HEADS = {
    "scene": len(SCENES),
    "shape": len(world.SHAPES),
    "color": len(world.COLORS),
    "face": 2,
    "wall": len(world.COLORS),
    "floor": len(world.COLORS),
}
SHIPPED = Path(__file__).parent.parent / "weights" / "shapes" / "classifier"
CHANNELS = (24, 48, 72, 96, 96)
POOL_IMAGES = 6_000
HELD_OUT_IMAGES = 1_000
CENTER_IMAGES = 1_000
BATCH = 64
LEARNING_RATE = 3e-3
BLANK_SHARE = 0.12  # of every training batch shows nothing
FACE_PIXELS = 12  # a face counts as visible when it changes more pixels than this, as absent when it changes none
FACE_CHANGE = 0.1
FACE_OVERSAMPLING = 3.0
INK_SHARE = 0.05  # of a cell of the last map from which it counts as inked
INK_WEIGHT = 5.0  # of inked cells, which are rare, against others
INK_IMPORTANCE = 3.0  # of the ink against one label


@dataclass(frozen=True)
class Predictions:
    """The likeliest class of every head, `[N]` int64 each, on the CPU; a head is meaningful only in its own scene.

    scene: index into SCENES. shape, color, wall, floor: indices into the world's SHAPES and COLORS. face: 0 or 1.
    probabilities: head -> `[N, classes]` float32.
    """

    scene: Tensor
    shape: Tensor
    color: Tensor
    face: Tensor
    wall: Tensor
    floor: Tensor
    probabilities: Mapping[str, Tensor]

    def __getitem__(self, head: str) -> Tensor:
        """The predictions of one head by its name."""
        return self.probabilities[head].argmax(-1)


class Classifier(nn.Module):
    """Images `[N, 3, 64, 64]` in [0, 1] to one vector of logits for each of HEADS."""

    def __init__(self, channels: tuple[int, ...] = CHANNELS) -> None:
        super().__init__()
        self.channels = channels
        strides = (2, 2, 1, 2, 1)
        sizes = (5, 3, 3, 3, 3)
        layers: list[nn.Module] = []
        width = 3
        for channel, stride, size in zip(channels, strides, sizes, strict=True):
            layers += [nn.Conv2d(width, channel, size, stride, size // 2), nn.GroupNorm(8, channel), nn.SiLU()]
            width = channel
        self.trunk = nn.Sequential(*layers)
        self.ink = nn.Conv2d(width, 1, 1)  # in which cells of the last map eyes and mouths are
        self.heads = nn.Linear(2 * width + 2, sum(HEADS.values()))
        self.center: Tensor
        self.register_buffer("center", torch.zeros(2 * width))  # mean features of the world's objects

    def features(self, images: Tensor) -> Tensor:
        """What the heads read: mean and maximum over the last map, `[N, 192]`; images of any size, differentiable."""
        return _pooled(self.maps(images))

    def maps(self, images: Tensor) -> Tensor:
        """The trunk's last maps `[N, 96, 8, 8]`."""
        maps: Tensor = self.trunk(_resized(images) * 2 - 1)
        return maps

    @torch.no_grad()
    def embed(self, images: Tensor, batch: int = 256) -> Tensor:
        """Features `[N, 192]` less their mean over the world's objects, on the CPU: what diversity is measured on.

        Without the centring all cosines would be close to 1, because the features are mostly positive.
        """
        device = self.heads.weight.device
        return torch.cat([(self.features(part.to(device)) - self.center).cpu() for part in images.split(batch)])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.read(self.maps(images))

    def read(self, maps: Tensor) -> dict[str, Tensor]:
        """The logits of every head from the trunk's last maps."""
        inked = self.ink(maps).sigmoid()
        parts = self.heads(torch.cat((_pooled(maps), _pooled(inked)), dim=1)).split(list(HEADS.values()), dim=1)
        return dict(zip(HEADS, parts, strict=True))

    @torch.no_grad()
    def classify(self, images: Tensor, batch: int = 256) -> Predictions:
        """Labels of images `[N, 3, H, W]` of any size, range or floating type, on any device; values are clamped to
        [0, 1]."""
        device = self.heads.weight.device
        chunks = [self(part.to(device)) for part in images.split(batch)] or [self(images.to(device))]
        probabilities = {head: torch.cat([chunk[head] for chunk in chunks]).softmax(-1).cpu() for head in HEADS}
        best = {head: values.argmax(-1) for head, values in probabilities.items()}
        return Predictions(**best, probabilities=probabilities)


def load_classifier(folder: Path = SHIPPED, device: str | torch.device = "cpu") -> Classifier:
    """The classifier saved in `folder` (the shipped one unless told), in float32, frozen. Raises PriorError if
    absent."""
    if not (folder / "model.safetensors").exists() or not (folder / "config.json").exists():
        raise PriorError(
            f"no classifier in {folder}: config.json and model.safetensors are expected there; "
            "train one with train_classifier(folder, seed=0)"
        )
    config = json.loads((folder / "config.json").read_text())
    model = Classifier(tuple(config["channels"]))
    model.load_state_dict({name: value.float() for name, value in load_file(folder / "model.safetensors").items()})
    return model.to(device).eval().requires_grad_(False)


def train_classifier(
    folder: Path, seed: int = 0, steps: int = 1200, report: Callable[[str], None] = print
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
    accuracy = measure_classifier(model, seed, report)
    _save(model, folder / "classifier", {"seed": seed, "steps": steps, "accuracy": accuracy})
    return model


def measure_classifier(
    model: Classifier, seed: int, report: Callable[[str], None], count: int = HELD_OUT_IMAGES
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


def face_pixels(labels: world.Labels, cameras: Cameras, samples: int = 2) -> Tensor:
    """Where the face is seen, bool `[B, 64, 64]`: the pixels in which a drawing with it differs from one without."""
    seen = torch.zeros(len(labels.face), world.RESOLUTION, world.RESOLUTION, dtype=torch.bool)
    chosen = (labels.face > 0).nonzero().squeeze(1)
    if len(chosen):
        grey = torch.full((len(chosen),), 0.5)
        faced, picked = labels[chosen], cameras[chosen]
        bare = world.Labels(faced.shape, faced.color, torch.zeros_like(faced.face), faced.wall, faced.floor)
        change = world.draw(faced, picked, grey, samples=samples) - world.draw(bare, picked, grey, samples=samples)
        seen[chosen] = change.abs().amax(1) > FACE_CHANGE
    return seen


def face_target(pixels: Tensor) -> Tensor:
    """From `face_pixels` `[B, 64, 64]`: 1 where a face is seen, 0 where none is, -1 where barely; int64 `[B]`."""
    count = pixels.sum((1, 2))
    return torch.where(count > FACE_PIXELS, 1, torch.where(count > 0, -1, 0))


def _draw_pool(count: int, draw: torch.Generator, report: Callable[[str], None]) -> tuple[Tensor, dict[str, Tensor]]:
    """Layers uint8 `[N, 5, 64, 64]` as `augment` takes them, and the target of every head `[N]` (-1: no loss)."""
    labels = world.sample_labels(count, draw, rooms=0.15, faces=0.5)
    cameras = world.sample_cameras(labels, draw)
    pool, faces, start = [], [], time.monotonic()
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
        if first % 2000 == 0:
            report(f"drawn {first} of {count} images, {time.monotonic() - start:.0f} s")
    room = labels.wall >= 0
    face = torch.cat(faces).where(~room, torch.full_like(labels.face, -1))
    targets = {"scene": room.long(), "shape": labels.shape, "color": labels.color, "face": face}
    return torch.cat(pool), targets | {"wall": labels.wall, "floor": labels.floor}


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
    """Cross-entropy summed over the heads, each a mean over the images that have its label, and that of the ink.

    Faces are a few pixels large. From one label an image the trunk does not find them in hundreds of steps; told in
    which cells of its last map there is ink, it does so at once.
    """
    maps = model.maps(images)
    losses = []
    for head, logits in model.read(maps).items():
        total = functional.cross_entropy(logits, targets[head], ignore_index=-1, reduction="sum")
        losses.append(total / (targets[head] >= 0).sum().clamp_min(1))
    cells = (functional.adaptive_avg_pool2d(ink, maps.shape[-2:]) > INK_SHARE).float()
    surprise = functional.binary_cross_entropy_with_logits(model.ink(maps), cells, pos_weight=torch.tensor(INK_WEIGHT))
    return torch.stack(losses).sum() + INK_IMPORTANCE * surprise


def _accuracy(predictions: Predictions, targets: dict[str, Tensor]) -> dict[str, float]:
    scores = {}
    for head in HEADS:
        known = targets[head] >= 0
        scores[head] = round(float((predictions[head][known] == targets[head][known]).float().mean()), 4)
    return scores


def _pooled(maps: Tensor) -> Tensor:
    """Mean and maximum over the pixels of maps `[N, C, h, w]`: `[N, 2 C]`."""
    return torch.cat((maps.mean((2, 3)), maps.amax((2, 3))), dim=1)


def _resized(images: Tensor) -> Tensor:
    images = images.float().nan_to_num(0.5, 1.0, 0.0).clamp(0, 1)
    size = (world.RESOLUTION, world.RESOLUTION)
    if images.shape[-2:] == size:
        return images
    if min(images.shape[-2:]) > world.RESOLUTION:
        return functional.interpolate(images, size, mode="area")
    return functional.interpolate(images, size, mode="bilinear", align_corners=False)


def _save(model: Classifier, folder: Path, facts: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.half().contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors"
    )
    classes: dict[str, object] = {"scene": SCENES, "shape": world.SHAPES, "face": ("none", "visible")}
    classes |= {head: world.COLORS for head in ("color", "wall", "floor")}
    config = {"resolution": world.RESOLUTION, "channels": model.channels, "classes": classes} | facts
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
