"""A pipeline on disk: finds its files and refuses, before any weight is read, what this program cannot run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distvsd.errors import PriorError
from distvsd.networks.files import Weights, check_length, fault_of, find_weights, is_file, is_folder, read_json, shown
from distvsd.networks.patch_codec import CLASS_NAME as PATCH_CODEC
from distvsd.networks.settings import check_settings, refuse_larger_than

EMBEDDED = "shapes"
EMBEDDED_FOLDER = Path(__file__).parents[1] / "shapes" / "weights"
_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
_CONFIGS = {
    "unet": "unet/config.json",
    "vae": "vae/config.json",
    "text_encoder": "text_encoder/config.json",
    "scheduler": "scheduler/scheduler_config.json",
}
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model")
_TOKENIZER_SUFFIXES = (".json", ".txt", ".model", ".jinja")
_FOREIGN_PARTS = ("transformer", "text_encoder_2", "prior")
# Conditions beside text and time that a UNet can need and that nothing here supplies.
_CONDITIONS = (
    "addition_embed_type",
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
)


@dataclass(frozen=True)
class PipelineFolder:
    """A checked folder, and exactly the files that loading it reads.

    configs: by component. weights: by component, none for a codec without weights. tokenizer: its files, by name.
    """

    path: Path
    index: dict[str, Any]
    configs: dict[str, dict[str, Any]]
    weights: dict[str, Weights]
    tokenizer: dict[str, Path]

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
        return int(vae["patch_size"]) if self.patch_codec else int(2 ** (len(vae["block_out_channels"]) - 1))

    @property
    def native_resolution(self) -> int:
        """Edge, in image pixels, that the UNet was trained at; 64 latent pixels where its configuration has none."""
        size = self.configs["unet"].get("sample_size") or 64
        return int(max(size) if isinstance(size, list) else size) * self.downscale

    def latent_shape(self, edge: int) -> tuple[int, int, int]:
        """Channels, height and width of the latents of a square image with this edge in pixels."""
        return self.latent_channels, edge // self.downscale, edge // self.downscale

    @property
    def text_length(self) -> int:
        """Tokens of a text, by the configuration of the text encoder."""
        length = self.configs["text_encoder"].get("max_position_embeddings", 77)
        return length if isinstance(length, int) and 1 <= length <= 4096 else 77

    @property
    def text_encoder_class(self) -> str:
        """The name of the text encoder's class in transformers."""
        return str(self.index["text_encoder"][1])

    def settings(self, component: str) -> dict[str, Any]:
        """The configuration a component is built from, without the keys that only record how the file was written."""
        return {
            key: value
            for key, value in self.configs[component].items()
            if key == "_class_name" or not (key.startswith("_") or key == "transformers_version")
        }

    def check_weights(self) -> None:
        """Reads the headers of all weight files. Raises PriorError where one is not a valid safetensors file, or holds
        fewer tensors than its configuration has layers."""
        for component, weights in self.weights.items():
            refuse_larger_than(weights, self.settings(component), f"the {component} in {self.path}")


def open_folder(path: str) -> PipelineFolder:
    """The pipeline at `path`, or the embedded one for "shapes"; raises PriorError with everything that is missing.

    Reads the configurations and finds the weight files, but does not read them (see `check_weights`). Runs no code of
    the pipeline.
    """
    root = _resolve(path)
    index = read_json(root / "model_index.json") if is_file(root / "model_index.json") else {}
    _check_kind(root, index)
    missing = [name for name in ("model_index.json", *_CONFIGS.values()) if not is_file(root / name)]
    tokenizer = _tokenizer_files(root / "tokenizer")
    if tokenizer.keys().isdisjoint(_TOKENIZER_FILES):
        missing.append("tokenizer/" + " or ".join(_TOKENIZER_FILES))
    if missing:
        odd = [name for name in missing if os.path.lexists(root / name)]
        odd_text = f" ({', '.join(odd)}: {fault_of(root / odd[0])})" if odd else ""
        raise PriorError(
            f"{root} is not a diffusers text-to-image pipeline: {', '.join(missing)} missing{odd_text}; "
            "give a folder in the layout that StableDiffusionPipeline.save_pretrained writes"
        )
    configs = {component: read_json(root / name) for component, name in _CONFIGS.items()}
    _check_classes(root, index, configs)
    _check_conditions(root, configs["unet"])
    check_settings(configs, str(root))
    weights = {part: find_weights(root / part, stem) for part, stem in _STEMS.items() if _has_weights(configs[part])}
    folder = PipelineFolder(root, index, configs, weights, tokenizer)
    _check_channels(folder)
    return folder


def _tokenizer_files(folder: Path) -> dict[str, Path]:
    """The files a tokenizer can be built from (tables and settings), by name; none where the folder is missing."""
    if not is_folder(folder):
        return {}
    found = [file for file in sorted(folder.iterdir()) if not file.name.startswith(".")]
    files = {file.name: file for file in found if file.suffix in _TOKENIZER_SUFFIXES and is_file(file)}
    for file in files.values():
        check_length(file)
    return files


def _has_weights(config: dict[str, Any]) -> bool:
    return config.get("_class_name") != PATCH_CODEC


def _resolve(path: str) -> Path:
    if path == EMBEDDED:
        root = EMBEDDED_FOLDER
        if not root.is_dir():
            raise PriorError(
                f"the embedded prior is not in this installation ({root} is not there); install the package with its "
                "data, or train it with `distvsd prior build` and give the folder that it writes as prior.path"
            )
        return root
    try:
        root = Path(path).expanduser()
        is_dir, is_there = root.is_dir(), root.exists()
    except (OSError, RuntimeError, ValueError) as error:  # no such user after ~, too long for a path, NUL in it
        raise PriorError(f"{path[:200]!r} cannot be the prior's folder: {str(error)[:200]}") from error
    if is_dir:
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
    """Refuses other families of pipelines by name, so that they are not reported as having missing files."""
    kind = index.get("_class_name", "a pipeline without a name")
    foreign = [part for part in _FOREIGN_PARTS if index.get(part) not in (None, [None, None])]
    if foreign or not isinstance(kind, str) or "XL" in kind:
        parts = f" (with {', '.join(foreign)})" if foreign else ""
        raise PriorError(
            f"{root} holds a {kind if isinstance(kind, str) else shown(kind)}{parts}, which is not supported: a prior "
            "is one UNet2DConditionModel with one text encoder, as in Stable Diffusion 1.x and 2.x"
        )


def _check_classes(root: Path, index: dict[str, Any], configs: dict[str, dict[str, Any]]) -> None:
    unet, vae = (configs[part].get("_class_name") for part in ("unet", "vae"))
    if unet not in (None, "UNet2DConditionModel"):
        raise PriorError(f"the UNet of {root} is a {shown(unet)}; only UNet2DConditionModel is supported")
    if vae not in (None, "AutoencoderKL", PATCH_CODEC):
        raise PriorError(f"the vae of {root} is a {shown(vae)}; known are AutoencoderKL and {PATCH_CODEC}")
    match index.get("text_encoder"):
        case ["transformers", str()]:
            pass
        case other:
            named = ".".join(map(str, other)) if isinstance(other, list) and len(other) == 2 else shown(other)
            raise PriorError(
                f"the text encoder of {root} is {named} by its model_index.json; known are the text encoders of "
                "transformers, as CLIPTextModel and CLIPTextModelWithProjection"
            )


def _check_conditions(root: Path, unet: dict[str, Any]) -> None:
    wanted = [f"{name} = {shown(unet[name])}" for name in _CONDITIONS if unet.get(name) is not None]
    if wanted:
        raise PriorError(
            f"the UNet of {root} needs conditions beside text and time ({', '.join(wanted)}), as SDXL and "
            "class-conditional models do; this is not supported: use a model in the manner of Stable Diffusion 1.x or "
            "2.x"
        )


def _check_channels(folder: PipelineFolder) -> None:
    unet, vae = folder.configs["unet"], folder.configs["vae"]
    where = f"the UNet of {folder.path}"
    channels_in, channels_out = unet.get("in_channels", 4), unet.get("out_channels", 4)
    if channels_in != channels_out:
        raise PriorError(
            f"{where} takes {channels_in} channels and returns {channels_out}; a prior returns as many as it takes "
            "(inpainting models and learned variances are not supported)"
        )
    if folder.latent_channels != channels_in:
        raise PriorError(
            f"{where} takes {channels_in} channels but the vae next to it makes {folder.latent_channels} "
            "(unet/config.json in_channels, vae/config.json); they are from different models"
        )
    if vae.get("latents_mean") is not None or vae.get("latents_std") is not None:
        raise PriorError(f"the vae of {folder.path} normalises each channel (latents_mean, latents_std): not supported")
