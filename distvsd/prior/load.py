"""Makes the prior of a run from a folder: any text-to-image pipeline in the layout of StableDiffusionPipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from distvsd.errors import PriorError
from distvsd.prior.autoencoder import Codec, VaeCodec
from distvsd.prior.codec import PatchCodec
from distvsd.prior.components import load_model, quiet
from distvsd.prior.folder import PipelineFolder, open_folder
from distvsd.prior.pipeline import Pipeline
from distvsd.prior.prompts import PromptTable
from distvsd.prior.text import encode_texts
from distvsd.vsd.diffusion import PredictionType


def load_prior(
    path: str,
    prompts: Sequence[str],
    negative_prompt: str = "",
    view_dependent: bool = True,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    micro_batch: int = 0,
    unet_device: torch.device | str | None = None,
) -> Pipeline:
    """The frozen pipeline at `path`, with `prompts` (one per particle id) encoded and the text encoder freed again.

    path: a folder, or "shapes" for the embedded prior; nothing is ever downloaded. view_dependent: every prompt is
    encoded with each view named too. dtype: of the UNet, the autoencoder and the texts, also by name ("float16").
    micro_batch: samples a UNet call, 0 for all. unet_device: where the UNet is left, if not on `device`: a strategy
    that spreads it over ranks takes it from there in parts. Each rank calls it for itself; it does not communicate.
    Warns of prompts longer than the text encoder reads. Raises PriorError, before any weight is read where the
    configurations tell.
    """
    folder = open_folder(path)
    place = torch.device(device)
    precision: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    scheduler = build_scheduler(folder)
    prediction_type = prediction_type_of(scheduler, folder)

    def encode(texts: Sequence[str]) -> Tensor:
        return encode_texts(folder, texts, precision, place)

    texts = PromptTable(prompts, negative_prompt, view_dependent, encode)
    if place.type == "cuda":
        torch.cuda.empty_cache()
    unet = _load_unet(folder, precision, torch.device(unet_device or place))
    codec = _load_codec(folder, precision, place)
    return Pipeline(folder, unet, codec, scheduler, prediction_type, texts, micro_batch, place)


def build_scheduler(folder: PipelineFolder) -> Any:
    """The scheduler, of the diffusers class its configuration names; it has the schedule `alphas_cumprod` `[T]`."""
    import diffusers

    config = folder.configs["scheduler"]
    name = str(config.get("_class_name"))
    scheduler_class = getattr(diffusers, name, None)
    if not (isinstance(scheduler_class, type) and issubclass(scheduler_class, diffusers.SchedulerMixin)):
        raise PriorError(
            f"{folder.path}/scheduler/scheduler_config.json names the scheduler {name!r}, which diffusers "
            f"{diffusers.__version__} does not have; name one of its own, such as DDIMScheduler"
        )
    try:
        with quiet():
            scheduler: Any = scheduler_class.from_config(dict(config))  # type: ignore[attr-defined]
    except (ValueError, TypeError, NotImplementedError) as error:
        raise PriorError(f"{folder.path}/scheduler cannot be built as a {name}: {error}") from error
    schedule = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(schedule, Tensor):
        raise PriorError(
            f"the scheduler of {folder.path} is a {name}, which has no alphas_cumprod: models trained by flow matching "
            "are not supported"
        )
    if not bool(((schedule >= 0) & (schedule <= 1)).all()):
        raise PriorError(f"the schedule of {folder.path} (alphas_cumprod) leaves [0, 1]; check scheduler_config.json")
    return scheduler


def prediction_type_of(scheduler: Any, folder: PipelineFolder) -> PredictionType:
    """What the UNet outputs, by the scheduler; where its configuration does not say, by its class (epsilon)."""
    name = getattr(scheduler.config, "prediction_type", "epsilon")
    for known in get_args(PredictionType):
        if name == known:
            return known  # type: ignore[no-any-return]
    raise PriorError(
        f"{folder.path}/scheduler/scheduler_config.json has prediction_type {name!r}; "
        f"known are {', '.join(get_args(PredictionType))}"
    )


def _load_unet(folder: PipelineFolder, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    return load_model(folder, "unet", UNet2DConditionModel, dtype, device)


def _load_codec(folder: PipelineFolder, dtype: torch.dtype, device: torch.device) -> Codec:
    config = folder.configs["vae"]
    if folder.patch_codec:
        return PatchCodec(
            int(config["patch_size"]), float(config["scaling_factor"]), float(config.get("detail_gain", 1.0))
        )
    from diffusers import AutoencoderKL

    return VaeCodec(load_model(folder, "vae", AutoencoderKL, dtype, device))
