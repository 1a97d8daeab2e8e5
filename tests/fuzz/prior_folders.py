"""Pipeline folders with random changes of configuration values, files, links and weights."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from distvsd.looking import describe_prior
from distvsd.prior import load_prior
from distvsd.testing.pipelines import tiny_pipeline

# Made at import, so that the imports of libraries count neither as time nor as memory of a case.
_HOME = tempfile.TemporaryDirectory(prefix="fuzz-priors-")
BASES = [tiny_pipeline(Path(_HOME.name) / layout, layout) for layout in ("sd15", "sd21", "shapes")]
for _base in BASES:
    load_prior(str(_base), ["a red cube"])

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 16, 64, 1000, 10**6, 2**31, 2**63, 10**12, 10**30, -(10**12)),
    *(0.0, 0.5, -0.5, 1e-30, 1e308, float("inf"), float("-inf"), float("nan")),
    *("", "a", "fp16", "none", "None", "../../../etc/passwd", "/etc/passwd", "\ud800", "x" * 5000, "float16", "auto"),
    *([], [[]], [1, 2], [1, 2, 3, 4], ["a", "b"], [None, None], {}, {"a": 1}, {"a": {"b": [1]}}, [0] * 5000),
    *(
        "DDPMScheduler",
        "PNDMScheduler",
        "EulerDiscreteScheduler",
        "LMSDiscreteScheduler",
        "FluxPipeline",
        "UNet2DModel",
    ),
    *("CLIPTextModelWithProjection", "CLIPModel", "T5EncoderModel", "BertModel", "GPT2Tokenizer", "T5Tokenizer"),
    *(
        "PatchCodec",
        "AutoencoderKL",
        "CrossAttnDownBlock2D",
        "AttnDownBlock2D",
        "UNetMidBlock2D",
        "gelu",
        "v_prediction",
    ),
]
# Settings that the libraries know, in addition to those in the files.
KEYS = [
    *(
        "quantization_config",
        "transformers_weights",
        "attn_implementation",
        "_attn_implementation",
        "auto_map",
        "dtype",
    ),
    *("torch_dtype", "fusion_config", "per_layer_config", "num_layers", "adapter", "architectures", "model_type"),
    *("configuration_files", "distributed_config", "id2label", "text_config", "encoder_hid_dim_type", "num_vectors"),
    *("class_embed_type", "addition_embed_type", "resnet_time_scale_shift", "time_embedding_type", "conv_in_kernel"),
    *("reverse_transformer_layers_per_block", "transformer_layers_per_block", "num_attention_heads", "attention_type"),
    *("shift_factor", "latents_mean", "use_quant_conv", "force_upcast", "mid_block_add_attention", "detail_gain"),
    *("trained_betas", "beta_schedule", "rescale_betas_zero_snr", "solver_order", "use_karras_sigmas", "steps_offset"),
    *("vocab_file", "tokenizer_file", "added_tokens_decoder", "extra_special_tokens", "pad_token", "init_inputs"),
    *("model_max_length", "padding_side", "chat_template", "use_attention_mask", "tie_word_embeddings", "_class_name"),
    *("_use_default_values", "_diffusers_version", "transformers_version", "tokenizer_class", "fast_tokenizer_files"),
]


def attempt(draw: random.Random, folder: Path) -> None:
    prior = folder / "prior"
    shutil.copytree(draw.choice(BASES), prior)
    for _ in range(draw.choice((0, 1, 1, 1, 1, 2, 3))):
        draw.choice(CHANGES)(draw, prior)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _use(draw, prior)


def _use(draw: random.Random, prior: Path) -> None:
    """Uses the prior as the commands and a training do: describes, loads, encodes, predicts and samples."""
    if draw.random() < 0.3:
        json.dumps(describe_prior.describe(str(prior)))
    loaded = load_prior(str(prior), ["a red cube", "b"], view_dependent=draw.random() < 0.5)
    loaded.identity()
    loaded.is_identified_by("0" * 64)
    side = 2 * loaded.folder.downscale
    loaded.decode(loaded.encode(torch.full((1, 3, side, side), 0.5)))
    zero = torch.zeros(1, dtype=torch.int64)
    times = loaded.process.times(torch.tensor([0.5]), 0.0, 1.0)
    loaded.guided_output(torch.ones(1, *loaded.latent_shape(side)), times, loaded.condition(zero, zero), 3.0)
    if draw.random() < 0.3 and loaded.resolution <= 128:
        loaded.sample([0], 1, 3.0, 2, 0)


def _configs(prior: Path) -> list[Path]:
    return [file for file in sorted(prior.rglob("*.json")) if file.is_file() and not file.is_symlink()]


def _change_value(draw: random.Random, prior: Path) -> None:
    """Replaces, removes or adds one value anywhere in one JSON file."""
    file = draw.choice(_configs(prior) or [prior / "model_index.json"])
    try:
        document = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return  # an earlier change removed or damaged it
    places = [place for place in _places(document) if not isinstance(place[0], str)]
    if not places:
        return
    inside, key = draw.choice(places[:400])
    match draw.randrange(6):
        case 0 if isinstance(inside, dict):
            del inside[key]
        case 1 if isinstance(inside, dict):
            inside[draw.choice(KEYS)] = draw.choice(VALUES)
        case 2 if isinstance(inside[key], int) and not isinstance(inside[key], bool):
            inside[key] = draw.choice((inside[key] + 1, -inside[key], inside[key] * 10**6, inside[key] * 10**12, 10**9))
        case 3:
            inside[key] = [inside[key]]
        case _:
            inside[key] = draw.choice(VALUES)
    file.write_bytes(json.dumps(document).encode())


def _places(document: Any) -> list[tuple[Any, Any]]:
    found, waiting = [], [document]
    while waiting:
        at = waiting.pop(0)
        keys = list(at) if isinstance(at, dict) else list(range(len(at))) if isinstance(at, list) else []
        found += [(at, key) for key in keys]
        waiting += [at[key] for key in keys]
    return found


def _change_bytes(draw: random.Random, prior: Path) -> None:
    file = _some_file(draw, prior)
    data = bytearray(file.read_bytes())
    at = draw.randrange(len(data) + 1)
    match draw.randrange(7):
        case 0:
            data = data[:at]
        case 1:
            data = bytearray()
        case 2:
            data[min(at, 200) : min(at, 200) + 8] = draw.randbytes(8)
        case 3:
            data[at:at] = b"\xff\xfe\x00" * draw.randrange(1, 100)
        case 4:
            data = bytearray(draw.randbytes(draw.randrange(1, 300)))
        case 5:
            data = bytearray(b"[" * draw.choice((10, 100, 900, 100_000)))
        case _:
            deep = draw.choice((20, 100, 900, 5000))
            data = bytearray(b'{"a": ' * deep + b"1" + b"}" * deep)
    file.write_bytes(data)


def _change_file(draw: random.Random, prior: Path) -> None:
    """Removes a file, puts something else in its place, or puts it behind a link as a cache of the hub does."""
    file = _some_file(draw, prior)
    blob = prior.parent / f"blob-{draw.randrange(10**9)}"
    shutil.move(file, blob)
    match draw.randrange(9):
        case 0:
            pass
        case 1:
            file.mkdir()
        case 2:
            os.mkfifo(file)
        case 3:
            file.symlink_to("nowhere")
        case 4:
            file.symlink_to(file.name)
        case 5:
            file.symlink_to("/dev/zero")
        case 6:
            file.symlink_to(os.path.relpath(blob, file.parent))
        case 7:
            file.symlink_to(blob)
        case _:
            with file.open("wb") as sparse:
                sparse.truncate(draw.choice((1, 10**6, 10**12)))


def _some_file(draw: random.Random, prior: Path) -> Path:
    files = [file for file in sorted(prior.rglob("*")) if file.is_file() and not file.is_symlink()]
    return draw.choice([file for file in files if file.stat().st_size < 10**8])


def _change_weights(draw: random.Random, prior: Path) -> None:
    file = draw.choice(sorted(prior.rglob("*.safetensors")) or [prior / "unet/diffusion_pytorch_model.safetensors"])
    try:
        weights = load_file(file)
    except Exception:  # an earlier change removed or damaged it
        return
    name = draw.choice([key for key in sorted(weights) if weights[key].is_floating_point()] or sorted(weights))
    half = {key: value.half() for key, value in weights.items()}
    match draw.randrange(14):
        case 0:
            del weights[name]
        case 1:
            weights[name] = torch.zeros(draw.choice([(), (0,), (1, 1), (3, 5, 7), (1000, 1000)]))
        case 2:
            weights[name].reshape(-1)[0] = draw.choice((float("nan"), float("inf"), 1e30))
        case 3:
            kinds = (torch.int8, torch.int64, torch.float64, torch.bool, torch.complex64, torch.float8_e4m3fn)
            weights[name] = weights[name].to(draw.choice(kinds))
        case 4:
            weights["another.weight"] = torch.ones(3)
        case 5:
            file.write_bytes(pickle.dumps({"conv_in.bias": [1.0]}))
            return
        case 6:
            file.rename(file.with_suffix(draw.choice((".bin", ".pt", ".ckpt", ""))))
            return
        case 7:
            (file.parent / "adapter_config.json").write_text(draw.choice(("{}", '{"peft_type": "LORA"}', "[")))
            return
        case 8:
            save_file(half, file.with_suffix(".fp16.safetensors"), {"format": "pt"})
            if draw.random() < 0.5:
                file.unlink()
            return
        case 9:
            save_file(half, file)  # without a format
            return
        case _:
            _cut_up(draw, file, weights)
            return
    save_file(weights, file, {"format": "pt"})


def _cut_up(draw: random.Random, file: Path, weights: dict[str, torch.Tensor]) -> None:
    """Splits the weights into two shards with an index. The index may be correct."""
    names = sorted(weights)
    parts = {
        f"{file.stem}-00001-of-00002.safetensors": names[::2],
        f"{file.stem}-00002-of-00002.safetensors": names[1::2],
    }
    places: dict[str, Any] = {}
    for part, of in parts.items():
        save_file({name: weights[name] for name in of}, file.parent / part, {"format": "pt"})
        places |= dict.fromkeys(of, part)
    if draw.random() < 0.9:
        file.unlink()
    evil = [
        "../../../etc/passwd",
        "pytorch_model.bin",
        "x.pt",
        "..",
        "",
        None,
        3,
        ["a"],
        "/etc/x.safetensors",
        "\ud800.safetensors",
    ]
    match draw.randrange(5):
        case 0:
            places[draw.choice(names)] = draw.choice(evil)
        case 1:
            places["unknown.weight"] = next(iter(parts))
        case 2:
            del places[draw.choice(names)]
    index: Any = {"metadata": {"total_size": 1}, "weight_map": places}
    if draw.random() < 0.1:
        index = draw.choice([{}, [], {"weight_map": None}, {"weight_map": {}}, {"weight_map": [1]}])
    Path(f"{file}.index.json").write_text(json.dumps(index))


def _add_something_harmless(draw: random.Random, prior: Path) -> None:
    match draw.randrange(4):
        case 0:
            (prior / "README.md").write_text("a prior")
        case 1:
            (draw.choice(sorted(prior.glob("*/"))) / ".gitattributes").write_bytes(b"\xff")
        case 2:
            (prior / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"never opened")
        case _:
            (prior / "safety_checker").mkdir(exist_ok=True)


CHANGES: list[Callable[[random.Random, Path], None]] = [
    *[_change_value] * 8,
    _change_bytes,
    _change_file,
    *[_change_weights] * 2,
    _add_something_harmless,
]
