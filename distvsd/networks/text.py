"""Encodes prompts with a pipeline's own tokenizer and text encoder, as StableDiffusionPipeline does, and frees both."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distvsd.errors import PriorError
from distvsd.networks.components import load_model, load_tokenizer, quiet
from distvsd.networks.files import shown
from distvsd.networks.folder import PipelineFolder
from distvsd.networks.settings import foreign

_BATCH = 64  # texts per call of the encoder
_MAX_LENGTH = 4096  # tokens of a text


@torch.no_grad()
def encode_texts(folder: PipelineFolder, texts: Sequence[str], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The last hidden states `[len(texts), L, D]` in `dtype`; L is the tokenizer's length, longer texts are cut there.

    The encoder runs in float32 for every `dtype`, and is freed afterwards. Warns of every text that is cut.
    Raises PriorError where the encoder cannot be loaded or its width is not what the UNet attends to.
    """
    tokenizer = load_tokenizer(folder)
    encoder = _load_encoder(folder, device)
    with quiet(), foreign(f"the text encoder of {folder.path} cannot encode with its tokenizer"):
        length = _length(tokenizer, encoder, folder)
        _warn_of_cut(tokenizer, texts, length)
        parts = [
            _encode(encoder, tokenizer, list(texts[first : first + _BATCH]), length, folder)
            for first in range(0, len(texts), _BATCH)
        ]
        embeddings = torch.cat(parts).to(dtype)
        _check_shape(embeddings, folder)
    if not bool(torch.isfinite(embeddings).all()):
        raise PriorError(
            f"the text encoder of {folder.path} gives values that are not finite in {dtype}; try prior.dtype=float32"
        )
    return embeddings


def _encode(encoder: Any, tokenizer: Any, texts: list[str], length: int, folder: PipelineFolder) -> Tensor:
    batch = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    known, highest = encoder.get_input_embeddings().num_embeddings, int(batch.input_ids.max())
    # Checked before the encoder runs: on a GPU an index outside of the embedding table ends the process.
    if int(batch.input_ids.min()) < 0 or highest >= known:
        raise PriorError(
            f"the tokenizer of {folder.path} gives a token the number {highest}, but the text encoder knows {known} "
            "tokens; they are from different models"
        )
    ids = batch.input_ids.to(encoder.device)
    # Most pipelines let the encoder attend to the padding too; the few others set use_attention_mask.
    masked = getattr(encoder.config, "use_attention_mask", False)
    output = encoder(ids, attention_mask=batch.attention_mask.to(ids.device) if masked else None)
    # By name: the first output of an encoder with projection is the pooled vector.
    return output.last_hidden_state  # type: ignore[no-any-return]


def _load_encoder(folder: PipelineFolder, device: torch.device) -> Any:
    import transformers

    name = folder.text_encoder_class
    with foreign(f"transformers {transformers.__version__} cannot import the text encoder of {folder.path}"):
        model_class = getattr(transformers, name, None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise PriorError(
            f"the text encoder of {folder.path} is transformers.{shown(name)} by its model_index.json; known are the "
            "text encoders of transformers, as CLIPTextModel and CLIPTextModelWithProjection"
        )
    encoder = load_model(folder, "text_encoder", model_class, torch.float32, device)
    width, attended = getattr(encoder.config, "hidden_size", None), attended_widths(folder)
    if attended != {width}:
        raise PriorError(
            f"the UNet of {folder.path} attends to texts of width {', '.join(map(str, sorted(attended)))} "
            f"(cross_attention_dim) but its text encoder gives width {width} (hidden_size); they are from different "
            "models"
        )
    return encoder


def _check_shape(embeddings: Tensor, folder: PipelineFolder) -> None:
    if embeddings.ndim != 3 or {embeddings.shape[2]} != attended_widths(folder):
        raise PriorError(
            f"the text encoder of {folder.path} gives texts of shape {tuple(embeddings.shape[1:])}, which its UNet "
            f"cannot attend to; it attends to width {', '.join(map(str, attended_widths(folder)))}"
        )


def attended_widths(folder: PipelineFolder) -> set[int]:
    width = folder.configs["unet"].get("cross_attention_dim", 1280)
    return set(width) if isinstance(width, list) else {width}


def _length(tokenizer: Any, encoder: Any, folder: PipelineFolder) -> int:
    """Tokens a text is padded or cut to; a tokenizer without a length of its own reports a very large one."""
    if tokenizer.pad_token_id is None:
        raise PriorError(
            f"the tokenizer in {folder.path / 'tokenizer'} has no token to pad with; name one as pad_token in "
            "tokenizer_config.json, the one the text encoder was trained with"
        )
    lengths = [tokenizer.model_max_length, getattr(encoder.config, "max_position_embeddings", None)]
    shortest = min(length for length in lengths if length is not None)
    if not 1 <= shortest <= _MAX_LENGTH:
        raise PriorError(
            f"the tokenizer of {folder.path} gives texts a length of {shown(shortest)} tokens; allowed: 1 to "
            f"{_MAX_LENGTH}, by model_max_length in tokenizer_config.json"
        )
    return int(shortest)


def _warn_of_cut(tokenizer: Any, texts: Sequence[str], length: int) -> None:
    counts = [len(ids) for ids in tokenizer(list(texts)).input_ids]
    cut = [(text, count) for text, count in zip(texts, counts, strict=True) if count > length]
    if cut:
        shown = ", ".join(f"{_short(text)!r} has {count} tokens" for text, count in cut[:5])
        more = f", and {len(cut) - 5} more texts are too long" if len(cut) > 5 else ""
        warnings.warn(
            f"the text encoder reads {length} tokens and the rest is cut, first the view words at the end: "
            f"{shown}{more}; shorten the prompt",
            stacklevel=2,
        )


def _short(text: str) -> str:
    """The text, or both of its ends where it is too long for a message."""
    return text if len(text) <= 100 else f"{text[:50]} ... {text[-40:]}"
