"""Floating-point operations of a network, from the shapes of its weights alone; no library and no weight is loaded.

Counted are the products of linear layers, convolutions and attention, 2 operations a multiply-add, as
`torch.utils.flop_counter` counts them. Names are those of diffusers' UNet2DConditionModel and AutoencoderKL.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

Shapes = Mapping[str, Sequence[int]]

# The two products of fused attention become five in its backward pass, of which one computes the scores again.
ATTENTION_BACKWARD = 2.5
_PER_SAMPLE = ("time_embedding.", "class_embedding.", "add_embedding.")
_BEFORE_THE_TIME = ("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight")
_OF_TEXT = (".attn2.to_k.", ".attn2.to_v.")
_QUERIES = (".to_q.weight", ".query.weight")  # the second in older files of autoencoders
_BLOCK = re.compile(r"(down|up)_blocks\.(\d{1,4})\.")


@dataclass(frozen=True)
class Operations:
    """fixed + pixel p + pair p^2 operations for one sample with p pixels."""

    fixed: float = 0.0
    pixel: float = 0.0
    pair: float = 0.0

    def at(self, pixels: int) -> float:
        return self.fixed + self.pixel * pixels + self.pair * pixels**2


@dataclass(frozen=True)
class NetworkOperations:
    """Of one sample. layers: linear layers and convolutions. attention: its two products. adapter: of a LoRA of rank 1.
    first: operations a pixel of the layers at whose input no gradient is needed."""

    layers: Operations
    attention: Operations
    adapter: Operations
    first: float = 0.0

    def forward(self, pixels: int, rank: int = 0) -> float:
        """One call, with an adapter of this rank. pixels: of the input, an image's or a latent's."""
        return self.layers.at(pixels) + self.attention.at(pixels) + rank * self.adapter.at(pixels)

    def backward(self, pixels: int, rank: int = 0) -> float:
        """The gradient at the input of every layer of the frozen network, and that of the adapter's weights.

        Layers that see only the text or the time have no gradient at their input.
        """
        frozen = (self.layers.pixel - self.first) * pixels + ATTENTION_BACKWARD * self.attention.at(pixels)
        return frozen + 2 * rank * self.adapter.at(pixels)


def unet_operations(shapes: Shapes, tokens: int, adapted: Sequence[str]) -> NetworkOperations:
    """Of a UNet with these weights, at p latent pixels. tokens: of a text. adapted: how the names of the layers end
    that get an adapter."""
    # The first number that is trained is the camera's, which joins the time after these two.
    first = sum(2.0 * math.prod(shapes.get(name, (0,))) for name in _BEFORE_THE_TIME)
    return replace(_counted(shapes, tokens, tuple(f".{target}.weight" for target in adapted)), first=first)


def encoder_operations(shapes: Shapes) -> NetworkOperations:
    """Of the encoder of an autoencoder with these weights, at p image pixels."""
    prefix = "encoder."
    own = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    return _counted(own | {name: shape for name, shape in shapes.items() if name.startswith("quant_conv.")}, 0, ())


def _counted(shapes: Shapes, tokens: int, adapted: tuple[str, ...]) -> NetworkOperations:
    depth_of = _Depths(shapes)
    layers, adapter, attention = [Operations()], [Operations()], [Operations()]
    for name, shape in _weights(shapes):
        depth = depth_of(name)
        layers.append(_of_layer(name, 2.0 * math.prod(shape), depth, tokens))
        if name.endswith(adapted):
            adapter.append(_of_layer(name, 2.0 * (shape[0] + shape[1]), depth, tokens))
        if name.endswith(_QUERIES):
            attention.append(_of_attention(name, 4.0 * shape[0], depth, tokens))
    return NetworkOperations(_sum(layers), _sum(attention), _sum(adapter))


def _weights(shapes: Shapes) -> Iterator[tuple[str, Sequence[int]]]:
    """Those of linear layers and convolutions; the others are vectors."""
    return ((name, shape) for name, shape in shapes.items() if name.endswith(".weight") and len(shape) in (2, 4))


def _of_layer(name: str, products: float, depth: int, tokens: int) -> Operations:
    """products: of one row of its input, or of one pixel of its output."""
    if name.startswith(_PER_SAMPLE) or ".time_emb_proj." in name:
        return Operations(fixed=products)
    if any(part in name for part in _OF_TEXT):
        return Operations(fixed=products * tokens)
    return Operations(pixel=products / 4**depth)


def _of_attention(name: str, products: float, depth: int, tokens: int) -> Operations:
    """products: of one query with one key, and of its weight with one value."""
    if ".attn2." in name:
        return Operations(pixel=products * tokens / 4**depth)
    return Operations(pair=products / 16**depth)


def _sum(parts: Sequence[Operations]) -> Operations:
    return Operations(
        sum(part.fixed for part in parts), sum(part.pixel for part in parts), sum(part.pair for part in parts)
    )


class _Depths:
    """How often the pixels' edge has been halved where a layer works."""

    def __init__(self, shapes: Shapes) -> None:
        self._down = {_block(name)[1] for name in shapes if ".downsamplers." in name and _block(name)[0] == "down"}
        self._up = {_block(name)[1] for name in shapes if ".upsamplers." in name and _block(name)[0] == "up"}

    def __call__(self, name: str) -> int:
        kind, number = _block(name)
        bottom = len(self._down)
        if name.startswith("conv_in."):
            return 0
        if kind == "down":
            return sum(other < number for other in self._down) + (".downsamplers." in name)
        if name.startswith("mid_block."):
            return bottom
        ups = sum(other < number for other in self._up) + (".upsamplers." in name) if kind == "up" else len(self._up)
        return max(bottom - ups, 0)


def _block(name: str) -> tuple[str, int]:
    found = _BLOCK.match(name)
    return (found[1], int(found[2])) if found else ("", -1)
