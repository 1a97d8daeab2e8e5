"""Makes the prior of a run from a folder: any text-to-image pipeline in the layout of StableDiffusionPipeline."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distvsd.networks.base import Condition
from distvsd.networks.folder import open_folder
from distvsd.networks.load import build_scheduler, load_codec, load_denoiser, process_of
from distvsd.networks.text import encode_texts
from distvsd.prior.pipeline import Pipeline
from distvsd.prior.prompts import PromptTable


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

    path: a folder, or "shapes" for the embedded prior; nothing is ever downloaded. view_dependent: every prompt is also
    encoded with the name of each view. dtype: of the UNet, the autoencoder and the texts, also by name ("float16").
    micro_batch: samples per UNet call, 0 for all. unet_device: where the UNet is left, if not on `device`; a strategy
    that spreads it over ranks takes it from there in parts. Each rank calls it for itself; it does not communicate.
    Warns of prompts longer than the text encoder reads. Raises PriorError; where the configurations show the fault,
    before any weight is read.
    """
    folder = open_folder(path)
    folder.check_weights()
    place = torch.device(device)
    precision: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    scheduler = build_scheduler(folder)
    process = process_of(scheduler, folder, place)

    def encode(texts: Sequence[str]) -> Condition:
        return Condition(encode_texts(folder, texts, precision, place))

    texts = PromptTable(prompts, negative_prompt, view_dependent, encode)
    if place.type == "cuda":
        torch.cuda.empty_cache()
    return Pipeline(
        folder=folder,
        denoiser=load_denoiser(folder, process, precision, torch.device(unet_device or place)),
        codec=load_codec(folder, precision, place),
        scheduler=scheduler,
        texts=texts,
        micro_batch=micro_batch,
        device=place,
    )
