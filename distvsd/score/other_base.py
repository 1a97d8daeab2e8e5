"""A score network on another model than the prior's. In the paper the prior is SD 2.1 base, the score's SD 2.1 (v)."""

from __future__ import annotations

import torch

from distvsd.errors import PriorError
from distvsd.networks.base import Adaptable
from distvsd.networks.folder import PipelineFolder, open_folder
from distvsd.networks.load import build_scheduler, load_denoiser, process_of
from distvsd.vsd.process import Diffusion, Process


def load_other_base(
    path: str,
    *,
    prior: PipelineFolder,
    process: Process,
    dtype: torch.dtype,
    device: torch.device,
    network_device: torch.device,
) -> Adaptable:
    """The network of the pipeline at `path`, frozen, in `dtype`.

    process: the prior's. device: of the noise schedule. network_device: where the network is left, see `unet_device` of
    `load_prior`. Each rank calls it for itself; it does not communicate. Raises PriorError where the network cannot be
    loaded, and where its latents, texts or noise schedule are not the prior's: its score would be of other images.
    """
    folder = open_folder(path)
    folder.check_weights()
    _refuse_other_inputs(folder, prior)
    other = process_of(build_scheduler(folder), folder, device)
    if not (isinstance(process, Diffusion) and _same_schedule(process, other)):
        raise PriorError(
            f"score.base {folder.path} was trained on another noise schedule than prior.path {prior.path}: the noise "
            "at a time differs (scheduler/scheduler_config.json); choose a base with the prior's schedule"
        )
    return load_denoiser(folder, other, dtype, network_device)


def _same_schedule(one: Diffusion, other: Diffusion) -> bool:
    tables = one.alphas_cumprod, other.alphas_cumprod
    return tables[0].shape == tables[1].shape and torch.allclose(tables[0], tables[1], atol=1e-4)


def _refuse_other_inputs(base: PipelineFolder, prior: PipelineFolder) -> None:
    if (base.latent_channels, base.downscale) != (prior.latent_channels, prior.downscale):
        raise PriorError(
            f"score.base {base.path} has latents of {base.latent_channels} channels, {base.downscale} pixels an edge, "
            f"and prior.path {prior.path} of {prior.latent_channels} channels, {prior.downscale} pixels; choose a base "
            "with the prior's latents"
        )
    texts = [folder.settings("text_encoder") | {"class": folder.text_encoder_class} for folder in (base, prior)]
    if texts[0] != texts[1] or base.tokenizer.keys() != prior.tokenizer.keys():
        raise PriorError(
            f"score.base {base.path} has another text encoder than prior.path {prior.path} (text_encoder/config.json, "
            "tokenizer): the prior's texts would mean something else to it; choose a base with the prior's text encoder"
        )
