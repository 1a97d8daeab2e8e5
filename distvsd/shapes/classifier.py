"""Recognises the labels of the shapes world in images: renders of particles, samples of the prior, drawings.

A small convolutional network with one head a label. Only evaluation uses it, never the training of particles.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from distvsd.errors import PriorError
from distvsd.shapes import world

SCENES = ("object", "room", "neither")
HEADS = {
    "scene": len(SCENES),
    "shape": len(world.SHAPES),
    "color": len(world.COLORS),
    "face": 2,
    "wall": len(world.COLORS),
    "floor": len(world.COLORS),
}
SHIPPED = Path(__file__).parent / "weights" / "classifier"
CHANNELS = (24, 48, 72, 96, 96)


@dataclass(frozen=True)
class Predictions:
    """The likeliest class of every head, `[N]` int64 each, on the CPU. A head is meaningful only in its own scene.

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
        self.ink = nn.Conv2d(width, 1, 1)  # the cells of the last map that hold eyes and mouths
        self.heads = nn.Linear(2 * width + 2, sum(HEADS.values()))
        self.center: Tensor
        self.register_buffer("center", torch.zeros(2 * width))  # mean features of the world's objects

    def features(self, images: Tensor) -> Tensor:
        """Features `[N, 192]`: mean and maximum over the last map. Images of any size; differentiable."""
        return _pooled(self.maps(images))

    def maps(self, images: Tensor) -> Tensor:
        """The trunk's last maps `[N, 96, 8, 8]`."""
        maps: Tensor = self.trunk(_resized(images) * 2 - 1)
        return maps

    @torch.no_grad()
    def embed(self, images: Tensor, batch: int = 256) -> Tensor:
        """Features `[N, 192]` minus their mean over the world's objects, on the CPU; diversity is measured on them.

        Without that all cosines would be close to 1, because the features are mostly positive.
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
        """Labels of images `[N, 3, H, W]` of any size, floating type and device; values are clamped to [0, 1]."""
        device = self.heads.weight.device
        chunks = [self(part.to(device)) for part in images.split(batch)] or [self(images.to(device))]
        probabilities = {head: torch.cat([chunk[head] for chunk in chunks]).softmax(-1).cpu() for head in HEADS}
        best = {head: values.argmax(-1) for head, values in probabilities.items()}
        return Predictions(**best, probabilities=probabilities)


def load_classifier(folder: Path = SHIPPED, device: str | torch.device = "cpu") -> Classifier:
    """The classifier in `folder`, by default the shipped one: float32, frozen. Raises PriorError if there is none."""
    if not (folder / "model.safetensors").exists() or not (folder / "config.json").exists():
        raise PriorError(
            f"no classifier in {folder}: config.json and model.safetensors are expected there; "
            "train one with train_classifier(folder, seed=0)"
        )
    config = json.loads((folder / "config.json").read_text())
    model = Classifier(tuple(config["channels"]))
    model.load_state_dict({name: value.float() for name, value in load_file(folder / "model.safetensors").items()})
    return model.to(device).eval().requires_grad_(False)


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
