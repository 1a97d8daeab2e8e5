"""A score network on another model than the prior's. In the paper the prior is SD 2.1 base, the score's SD 2.1 (v)."""

from __future__ import annotations

import torch

from distvsd.errors import PriorError
from distvsd.networks.base import Adaptable
from distvsd.networks.folder import PipelineFolder, open_folder
from distvsd.networks.load import build_scheduler, load_denoiser, process_of
from distvsd.vsd.process import Process

_CODEC_SCALE = ("scaling_factor", "shift_factor", "patch_size", "detail_gain")
_VOCABULARY = ("vocab.json", "merges.txt", "tokenizer.json", "spiece.model")  # what gives a word its number


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
    if not other.agrees_with(process):
        raise PriorError(
            f"score.base {folder.path} was trained on another noise schedule than prior.path {prior.path}: the noise "
            "at a time differs (scheduler/scheduler_config.json); choose a base with the prior's schedule"
        )
    return load_denoiser(folder, other, dtype, network_device)


def _refuse_other_inputs(base: PipelineFolder, prior: PipelineFolder) -> None:
    if (base.latent_channels, base.downscale) != (prior.latent_channels, prior.downscale):
        raise PriorError(
            f"score.base {base.path} has latents of {base.latent_channels} channels, {base.downscale} pixels an edge, "
            f"and prior.path {prior.path} of {prior.latent_channels} channels, {prior.downscale} pixels; choose a base "
            "with the prior's latents"
        )
    codecs = [{key: folder.settings("vae").get(key) for key in _CODEC_SCALE} for folder in (base, prior)]
    if codecs[0] != codecs[1]:
        raise PriorError(
            f"score.base {base.path} scales its latents otherwise than prior.path {prior.path} (vae/config.json: "
            f"{codecs[0]} and {codecs[1]}); choose a base with the prior's latents"
        )
    if _texts(base) != _texts(prior):
        raise PriorError(
            f"score.base {base.path} has another text encoder than prior.path {prior.path} (text_encoder/config.json, "
            "tokenizer): the prior's texts would mean something else to it; choose a base with the prior's text encoder"
        )


def _texts(folder: PipelineFolder) -> tuple[object, ...]:
    """What decides the meaning of a text's embedding, without the weights: their number format may differ."""
    settings = {key: value for key, value in folder.settings("text_encoder").items() if "dtype" not in key}
    files = {name: file.read_bytes() for name, file in folder.tokenizer.items() if name in _VOCABULARY}
    return settings, folder.text_encoder_class, files
