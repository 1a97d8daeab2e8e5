"""Encodes prompts with a pipeline's own tokenizer and text encoder, as StableDiffusionPipeline does, and frees both."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distvsd.errors import PriorError
from distvsd.prior.components import load_model, quiet
from distvsd.prior.folder import PipelineFolder

_BATCH = 64  # texts a call of the encoder


@torch.no_grad()
def encode_texts(folder: PipelineFolder, texts: Sequence[str], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The last hidden states `[len(texts), L, D]` in `dtype`; L is the tokenizer's length, longer texts are cut there.

    The encoder runs in float32 whatever `dtype`, and nothing holds it afterwards. Warns of every text that is cut.
    Raises PriorError where the encoder cannot be loaded or its width is not what the UNet attends to.
    """
    tokenizer = _load_tokenizer(folder)
    encoder = _load_encoder(folder, device)
    length = _length(tokenizer, encoder)
    with quiet():
        _warn_of_cut(tokenizer, texts, length)
        parts = [
            _encode(encoder, tokenizer, list(texts[first : first + _BATCH]), length)
            for first in range(0, len(texts), _BATCH)
        ]
    embeddings = torch.cat(parts).to(dtype)
    if not bool(torch.isfinite(embeddings).all()):
        raise PriorError(
            f"the text encoder of {folder.path} gives values that are not finite in {dtype}; try prior.dtype=float32"
        )
    return embeddings


def _encode(encoder: Any, tokenizer: Any, texts: list[str], length: int) -> Tensor:
    batch = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ids = batch.input_ids.to(encoder.device)
    # Most pipelines let the encoder attend to the padding too; the few that do not say so in its configuration.
    masked = getattr(encoder.config, "use_attention_mask", False)
    output = encoder(ids, attention_mask=batch.attention_mask.to(ids.device) if masked else None)
    # By name: the first output of an encoder with projection is the pooled vector.
    return output.last_hidden_state  # type: ignore[no-any-return]


def _load_tokenizer(folder: PipelineFolder) -> Any:
    from transformers import AutoTokenizer

    path = folder.path / "tokenizer"
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PriorError(
            f"the tokenizer in {path} cannot be loaded: {error}; fetch or save the pipeline again"
        ) from error


def _load_encoder(folder: PipelineFolder, device: torch.device) -> Any:
    import transformers

    library, name = folder.index.get("text_encoder", (None, None))
    model_class = getattr(transformers, str(name), None) if library == "transformers" else None
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise PriorError(
            f"the text encoder of {folder.path} is {library}.{name} by its model_index.json; known are the text "
            "encoders of transformers, as CLIPTextModel and CLIPTextModelWithProjection"
        )
    encoder = load_model(folder, "text_encoder", model_class, torch.float32, device)
    width, attended = getattr(encoder.config, "hidden_size", None), _attended_widths(folder)
    if attended != {width}:
        raise PriorError(
            f"the UNet of {folder.path} attends to texts of width {', '.join(map(str, sorted(attended)))} "
            f"(cross_attention_dim) but its text encoder gives width {width} (hidden_size); they are from different "
            "models"
        )
    return encoder


def _attended_widths(folder: PipelineFolder) -> set[int]:
    width = folder.configs["unet"].get("cross_attention_dim", 1280)
    return set(width) if isinstance(width, list) else {width}


def _length(tokenizer: Any, encoder: Any) -> int:
    """Tokens a text is padded or cut to; a tokenizer without a length of its own reports a very large one."""
    longest = getattr(encoder.config, "max_position_embeddings", None)
    return min(tokenizer.model_max_length, longest) if longest else int(tokenizer.model_max_length)


def _warn_of_cut(tokenizer: Any, texts: Sequence[str], length: int) -> None:
    counts = [len(ids) for ids in tokenizer(list(texts)).input_ids]
    cut = [(text, count) for text, count in zip(texts, counts, strict=True) if count > length]
    if cut:
        shown = ", ".join(f"{_short(text)!r} has {count} tokens" for text, count in cut[:5])
        more = f", and {len(cut) - 5} more texts are too long" if len(cut) > 5 else ""
        warnings.warn(
            f"the text encoder reads {length} tokens and what follows is cut, the words for the view first: "
            f"{shown}{more}; shorten the prompt",
            stacklevel=2,
        )


def _short(text: str) -> str:
    """Both ends of a text that would flood a message."""
    return text if len(text) <= 100 else f"{text[:50]} ... {text[-40:]}"
