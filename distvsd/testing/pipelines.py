"""Tiny random pipelines in the real layouts, for tests of code that takes a prior: made in a moment, never trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from distvsd.networks.components import quiet
from distvsd.networks.patch_codec import PatchCodec
from distvsd.shapes.captions import save_tokenizer
from distvsd.vsd.process import PredictionType
from distvsd.vsd.rng import Purpose, seeded

Layout = Literal["sd15", "sd21", "shapes"]

_WORDS = (
    *("a", "red", "green", "blue", "cube", "sphere", "with", "face"),
    *("front", "side", "back", "overhead", "three", "quarter", "view", "from", "above"),
)
_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"
_TOKENS = {"sd15": 77, "sd21": 77, "shapes": 16}
_TEXT_WIDTH = {"sd15": 32, "sd21": 48, "shapes": 32}
_PREDICTION: dict[Layout, PredictionType] = {"sd15": "epsilon", "sd21": "v_prediction", "shapes": "v_prediction"}


def tiny_pipeline(
    folder: Path,
    layout: Layout = "shapes",
    prediction_type: PredictionType | None = None,
    seed: int = 0,
    levels: Literal[1, 2] = 2,
) -> Path:
    """Writes a random pipeline of a few 100,000 parameters to `folder` and returns `folder`; deterministic by `seed`.

    layout: what the files look like. "sd15" and "sd21" are Stable Diffusion 1.5 and 2.1 (64 x 64 images, 4 x 8 x 8
    latents, an AutoencoderKL, 77 tokens), "shapes" the embedded prior (32 x 32 images, 48 x 8 x 8 latents, PatchCodec,
    16 tokens, a schedule that ends in pure noise). prediction_type: the layout's own where None. levels: of the UNet;
    one level without a middle block takes less time, for tests that are about something else.
    """
    folder = Path(folder)
    prediction = prediction_type or _PREDICTION[layout]
    vocabulary = _write_tokenizer(folder / "tokenizer", layout)
    with quiet(), seeded(seed, Purpose.BUILD):
        _unet(layout, levels).save_pretrained(folder / "unet", safe_serialization=True)
        _write_text_encoder(folder / "text_encoder", layout, vocabulary)
        if layout == "shapes":
            PatchCodec(4, 1.6).save_pretrained(folder / "vae")
        else:
            _vae().save_pretrained(folder / "vae", safe_serialization=True)
    scheduler = _scheduler(layout, prediction)
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.35.0",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast" if layout == "shapes" else "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["distvsd.networks.patch_codec", "PatchCodec"] if layout == "shapes" else ["diffusers", "AutoencoderKL"],
    }
    _write_json(folder / "model_index.json", index)
    return folder


def _unet(layout: Layout, levels: int) -> Any:
    from diffusers import UNet2DConditionModel

    channels = 48 if layout == "shapes" else 4
    # Version 2 gives the number of heads of each level under this name, and projects by linear layers.
    second = {"attention_head_dim": [2, 4], "use_linear_projection": True} if layout == "sd21" else {}
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(16, 32)[:levels],
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D")[:levels],
        mid_block_type="UNetMidBlock2DCrossAttn" if levels > 1 else None,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")[-levels:],
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=_TEXT_WIDTH[layout],
        **({"attention_head_dim": 4} | second),
    )


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.18215,
    )


def _write_text_encoder(folder: Path, layout: Layout, vocabulary: dict[str, int]) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=_TEXT_WIDTH[layout],
        intermediate_size=2 * _TEXT_WIDTH[layout],
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=_TOKENS[layout],
        hidden_act="gelu" if layout == "sd21" else "quick_gelu",
        projection_dim=_TEXT_WIDTH[layout],
        bos_token_id=vocabulary[_BEGIN],
        eos_token_id=vocabulary[_END],
        pad_token_id=0 if layout == "sd21" else vocabulary[_END],
    )
    CLIPTextModel(config).save_pretrained(folder)
    # Newer versions of transformers leave out this prefix; published files have it.
    weights = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in _weights(folder).items()}
    if layout != "shapes":
        weights["text_model.embeddings.position_ids"] = torch.arange(_TOKENS[layout])[None]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()}


def _scheduler(layout: Layout, prediction: PredictionType) -> Any:
    from diffusers import DDIMScheduler, PNDMScheduler

    stable: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": prediction,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    match layout:
        case "sd15":
            return PNDMScheduler(skip_prk_steps=True, **stable)
        case "sd21":
            return DDIMScheduler(clip_sample=False, **stable)
        case "shapes":
            stable |= {"rescale_betas_zero_snr": True, "set_alpha_to_one": True, "steps_offset": 0}
            return DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **stable)


def _write_tokenizer(folder: Path, layout: Layout) -> dict[str, int]:
    """CLIP's four files, with the printable ASCII characters and a few whole words; returns the vocabulary.

    The embedded prior's layout gets the embedded prior's own tokenizer, in one file.
    """
    if layout == "shapes":
        save_tokenizer(folder)
        return _read_vocabulary(folder / "tokenizer.json")
    characters = [chr(code) for code in range(33, 127)]
    merges = list(dict.fromkeys(merge for word in _WORDS for merge in _merges(word)))
    tokens = characters + [f"{char}</w>" for char in characters] + ["".join(merge) for merge in merges] + [_BEGIN, _END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {
        "bos_token": _BEGIN,
        "eos_token": _END,
        "unk_token": _END,
        "pad_token": "!" if layout == "sd21" else _END,
    }
    _write_json(folder / "special_tokens_map.json", special)
    settings = {"model_max_length": _TOKENS[layout], "tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
    _write_json(folder / "tokenizer_config.json", special | settings)
    return vocabulary


def _read_vocabulary(path: Path) -> dict[str, int]:
    vocabulary: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
    return vocabulary


def _merges(word: str) -> list[tuple[str, str]]:
    """The byte-pair merges that build a word from left to right."""
    parts = [*word[:-1], f"{word[-1]}</w>"]
    return [("".join(parts[:end]), parts[end]) for end in range(1, len(parts))]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
