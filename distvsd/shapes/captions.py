"""Captions of the shapes world at several levels of detail, and the tokenizer of their words."""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from torch import Tensor

from distvsd.cameras import Cameras
from distvsd.prior.prompts import VIEWS, view_suffix
from distvsd.shapes.world import COLORS, SHAPES, Labels

MAX_TOKENS = 16
LEVELS = ("full", "shape", "color", "object", "empty")
LEVEL_WEIGHTS = torch.tensor([0.44, 0.12, 0.12, 0.22, 0.10])
SUFFIX_SHARE = 0.5  # of the captions name the view


def article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def caption(shape: int, color: int, face: int, wall: int, floor: int, level: str) -> str:
    """One caption. Labels as in `world.Labels`; level: one of LEVELS. Rooms have only full, object ("a room") and
    empty."""
    if level == "empty":
        return ""
    if wall >= 0:
        detail = f" with {COLORS[wall]} walls and {article(COLORS[floor])} floor" if level != "object" else ""
        return f"inside a room{detail}"
    subject = {
        "full": f"{article(COLORS[color])} {SHAPES[shape]}",
        "shape": article(SHAPES[shape]),
        "color": f"something {COLORS[color]}",
        "object": "an object",
    }[level]
    return subject + (" with a face" if face else "")


def draw_levels(count: int, generator: torch.Generator) -> Tensor:
    """Random indices into LEVELS, by LEVEL_WEIGHTS, int64 `[count]`."""
    return torch.multinomial(LEVEL_WEIGHTS, count, replacement=True, generator=generator)


def draw_captions(labels: Labels, cameras: Cameras, levels: Tensor, generator: torch.Generator) -> list[str]:
    """A caption for each image at its level `[N]`; SUFFIX_SHARE of the captions of objects name the view."""
    suffixed = (torch.rand(len(levels), generator=generator) < SUFFIX_SHARE).tolist()
    rows = torch.stack((labels.shape, labels.color, labels.face, labels.wall, labels.floor), dim=1).tolist()
    views = [
        view_suffix(math.degrees(e), math.degrees(a))
        for e, a in zip(cameras.elevation.tolist(), cameras.azimuth.tolist(), strict=True)
    ]
    texts = []
    for row, level, named, view in zip(rows, levels.tolist(), suffixed, views, strict=True):
        text = caption(row[0], row[1], row[2], row[3], row[4], LEVELS[level])
        texts.append(f"{text}, {view}" if named and text and row[3] < 0 else text)
    return texts


def every_caption() -> list[str]:
    """All captions of the world; the tokenizer's words come from them."""
    texts = set()
    for level in LEVELS:
        for color in range(len(COLORS)):
            for other in range(len(SHAPES)):
                for face in (0, 1):
                    texts.add(caption(other, color, face, -1, -1, level))
            for floor in range(len(COLORS)):
                texts.add(caption(-1, -1, 0, color, floor, level))
    return sorted(texts | {f"{text}, {view}" for text in texts if text and "room" not in text for view in VIEWS})


def save_tokenizer(folder: Path) -> None:
    """Writes a tokenizer in the transformers format: lower-cased words of the captions, single letters for other words,
    begin and end marks, 16 tokens.

    It is not trained: a trainer of byte pairs numbers equally frequent letters differently in every process.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<|startoftext|>", "<|endoftext|>", "<|unk|>"]
    words = sorted({word for text in every_caption() for word in re.findall(r"\w+|[^\w\s]", text)})
    letters = [chr(code) for code in range(33, 127)]
    pieces = dict.fromkeys([*special, *words, *letters, *(f"##{letter}" for letter in letters)])
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=special[2]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A {special[1]}", special_tokens=[(special[0], 0), (special[1], 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[1],
        unk_token=special[2],
        pad_token=special[1],
        model_max_length=MAX_TOKENS,
    ).save_pretrained(folder)


def tokenize(tokenizer: object, texts: list[str]) -> Tensor:
    """Token ids `[B, MAX_TOKENS]`, padded as in a diffusers pipeline."""
    batch = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")  # type: ignore[operator]
    ids: Tensor = batch.input_ids
    return ids
