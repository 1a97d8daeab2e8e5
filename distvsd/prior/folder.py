"""A pipeline on disk: finds its files and refuses, before any weight is read, what this program cannot run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distvsd.errors import PriorError
from distvsd.prior.codec import CLASS_NAME as PATCH_CODEC

EMBEDDED = "shapes"
_WEIGHTS_ROOT = Path(__file__).parent / "weights"
_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
_CONFIGS = {
    "unet": "unet/config.json",
    "vae": "vae/config.json",
    "text_encoder": "text_encoder/config.json",
    "scheduler": "scheduler/scheduler_config.json",
}
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model")
_FOREIGN_PARTS = ("transformer", "text_encoder_2", "prior")
# Conditions a UNet can want beside text and time; eps() has nothing to give it for them.
_CONDITIONS = ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim", "time_cond_proj_dim")


@dataclass(frozen=True)
class PipelineFolder:
    """A checked folder. configs: by component. weights: files by component, none for a codec without weights.

    half: components whose only weights are the `fp16` variant.
    """

    path: Path
    index: dict[str, Any]
    configs: dict[str, dict[str, Any]]
    weights: dict[str, tuple[Path, ...]]
    half: frozenset[str]

    @property
    def patch_codec(self) -> bool:
        return bool(self.configs["vae"].get("_class_name") == PATCH_CODEC)

    @property
    def latent_channels(self) -> int:
        vae = self.configs["vae"]
        return 3 * int(vae["patch_size"]) ** 2 if self.patch_codec else int(vae.get("latent_channels", 4))

    @property
    def downscale(self) -> int:
        """Image pixels along a side of one latent pixel."""
        vae = self.configs["vae"]
        return int(vae["patch_size"]) if self.patch_codec else int(2 ** (len(vae.get("block_out_channels", (64,))) - 1))

    @property
    def native_resolution(self) -> int:
        """Image pixels a side the UNet was trained at; 64 latent pixels where its configuration does not say."""
        size = self.configs["unet"].get("sample_size") or 64
        return int(max(size) if isinstance(size, list) else size) * self.downscale

    def identity(self) -> str:
        """SHA-256 over configurations and weight files of all components and the tokenizer; reads each file once."""
        digest = hashlib.sha256()
        for component in sorted(self.configs):
            config = {
                key: value
                for key, value in self.configs[component].items()
                if key == "_class_name" or not (key.startswith("_") or key == "transformers_version")
            }
            digest.update(f"{component} {json.dumps(config, sort_keys=True)}\n".encode())
            for file in self.weights.get(component, ()):
                digest.update(_file_digest(file))
        for file in sorted((self.path / "tokenizer").iterdir()):
            if file.is_file() and not file.name.startswith("."):
                digest.update(f"tokenizer/{file.name}\n".encode() + _file_digest(file))
        return digest.hexdigest()


def open_folder(path: str) -> PipelineFolder:
    """The pipeline at `path`, or the embedded one for "shapes"; raises PriorError with everything that is missing."""
    root = _resolve(path)
    index = _read_json(root / "model_index.json") if (root / "model_index.json").is_file() else {}
    _check_kind(root, index)
    missing = [name for name in ("model_index.json", *_CONFIGS.values()) if not (root / name).is_file()]
    if not any((root / "tokenizer" / name).is_file() for name in _TOKENIZER_FILES):
        missing.append("tokenizer/" + " or ".join(_TOKENIZER_FILES))
    if missing:
        raise PriorError(
            f"{root} is not a diffusers text-to-image pipeline: {', '.join(missing)} missing; "
            "give a folder in the layout that StableDiffusionPipeline.save_pretrained writes"
        )
    configs = {component: _read_json(root / name) for component, name in _CONFIGS.items()}
    found = {c: _weight_files(root / c, _STEMS[c]) for c in _STEMS if not _without_weights(configs[c])}
    folder = PipelineFolder(
        path=root,
        index=index,
        configs=configs,
        weights={component: files for component, (files, _) in found.items()},
        half=frozenset(component for component, (_, half) in found.items() if half),
    )
    _check_supported(folder)
    return folder


def _resolve(path: str) -> Path:
    if path == EMBEDDED:
        root = _WEIGHTS_ROOT / EMBEDDED
        if not root.is_dir():
            raise PriorError(
                f"the embedded prior is not in this installation ({root} is not there); install the package with its "
                "data, or train it with `distvsd prior build` and give the folder that wrote as prior.path"
            )
        return root
    try:
        root = Path(path).expanduser()
        is_folder, is_there = root.is_dir(), root.exists()
    except (OSError, RuntimeError, ValueError) as error:  # no such user after ~, too long for a path, NUL in it
        raise PriorError(f"{path[:200]!r} cannot be the prior's folder: {str(error)[:200]}") from error
    if is_folder:
        return root
    if is_there:
        raise PriorError(
            f"the prior {path!r} is a file; give the folder of a diffusers pipeline (not a single checkpoint)"
        )
    if not path.startswith((".", "/", "~")) and path.count("/") == 1:
        raise PriorError(
            f"there is no folder {path!r} here; it reads like a model name on the hub, and nothing is downloaded: "
            f"fetch it once with `hf download {path} --local-dir FOLDER` and give that local folder, or give 'shapes', "
            "the embedded prior"
        )
    raise PriorError(
        f"there is no folder {path!r}; give the folder of a diffusers pipeline, or 'shapes', the embedded prior"
    )


def _check_kind(root: Path, index: dict[str, Any]) -> None:
    """Refuses other families of pipelines by their name, before files they never had are called missing."""
    kind = index.get("_class_name", "a pipeline without a name")
    foreign = [part for part in _FOREIGN_PARTS if index.get(part, [None, None]) != [None, None]]
    if foreign or "XL" in kind:
        parts = f" (with {', '.join(foreign)})" if foreign else ""
        raise PriorError(
            f"{root} holds a {kind}{parts}, which is not supported: a prior is one UNet2DConditionModel with one text "
            "encoder, as in Stable Diffusion 1.x and 2.x"
        )


def _check_supported(folder: PipelineFolder) -> None:
    unet = folder.configs["unet"]
    where = f"the UNet of {folder.path}"
    if unet.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        raise PriorError(f"{where} is a {unet['_class_name']}; only UNet2DConditionModel is supported")
    wanted = [f"{name} = {unet[name]!r}" for name in _CONDITIONS if unet.get(name) is not None]
    if wanted:
        raise PriorError(
            f"{where} wants conditions beside text and time ({', '.join(wanted)}), as SDXL and class-conditional "
            "models do; this is not supported: use a model in the manner of Stable Diffusion 1.x or 2.x"
        )
    channels_in, channels_out = unet.get("in_channels", 4), unet.get("out_channels", 4)
    if channels_in != channels_out:
        raise PriorError(
            f"{where} takes {channels_in} channels and returns {channels_out}; a prior returns as many as it takes "
            "(inpainting models and learned variances are not supported)"
        )
    vae = folder.configs["vae"]
    if not folder.patch_codec and vae.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise PriorError(
            f"the vae of {folder.path} is a {vae['_class_name']}; known are AutoencoderKL and {PATCH_CODEC}"
        )
    if folder.latent_channels != channels_in:
        raise PriorError(
            f"{where} takes {channels_in} channels but the vae next to it makes {folder.latent_channels} "
            "(unet/config.json in_channels, vae/config.json); they are from different models"
        )
    if vae.get("latents_mean") is not None or vae.get("latents_std") is not None:
        raise PriorError(f"the vae of {folder.path} normalises each channel (latents_mean, latents_std): not supported")


def _file_digest(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _without_weights(config: dict[str, Any]) -> bool:
    return config.get("_class_name") == PATCH_CODEC


def _weight_files(folder: Path, stem: str) -> tuple[tuple[Path, ...], bool]:
    """The safetensors files of a component, and whether they are its fp16 variant."""
    whole, half = folder / f"{stem}.safetensors", folder / f"{stem}.fp16.safetensors"
    shards = folder / f"{stem}.safetensors.index.json"
    if whole.is_file():
        return (whole,), False
    if shards.is_file():
        files = tuple(folder / name for name in sorted(set(_read_json(shards).get("weight_map", {}).values())))
        absent = [file.name for file in files if not file.is_file()]
        if absent or not files:
            raise PriorError(f"{shards} lists weight files that are not there: {', '.join(absent) or 'none at all'}")
        return files, False
    if half.is_file():
        return (half,), True
    pickles = sorted(file.name for pattern in ("*.bin", "*.ckpt", "*.pt") for file in folder.glob(pattern))
    if pickles:
        raise PriorError(
            f"{folder} has its weights only as {', '.join(pickles)}, a pickle, which can run code when it is read; "
            f"convert it to {whole.name} with save_pretrained(..., safe_serialization=True)"
        )
    raise PriorError(f"{whole} is missing: {folder.parent} is not a whole pipeline; fetch or save it again")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PriorError(f"{path} cannot be read as JSON ({error}); fetch or save the pipeline again") from error
    if not isinstance(value, dict):
        raise PriorError(f"{path} holds a {type(value).__name__} where a configuration is expected")
    return value
