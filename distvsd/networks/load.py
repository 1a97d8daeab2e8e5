"""Loads the scheduler, the UNet and the image codec of a diffusers pipeline."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from distvsd.errors import PriorError
from distvsd.networks.base import LatentSpace
from distvsd.networks.codec import Codec, VaeCodec
from distvsd.networks.components import load_model, quiet
from distvsd.networks.files import shown
from distvsd.networks.folder import PipelineFolder
from distvsd.networks.patch_codec import PatchCodec
from distvsd.networks.settings import foreign
from distvsd.networks.text import attended_widths
from distvsd.networks.unet import UNet
from distvsd.vsd.process import Diffusion, PredictionType, Process


def build_scheduler(folder: PipelineFolder) -> Any:
    """The scheduler, of the diffusers class that its configuration names; it has a schedule, `alphas_cumprod` `[T]`."""
    import diffusers

    name = str(folder.configs["scheduler"].get("_class_name"))
    with foreign(f"{folder.path}/scheduler cannot be built as a {shown(name)}"), quiet():
        scheduler_class = getattr(diffusers, name, None)
        if not (isinstance(scheduler_class, type) and issubclass(scheduler_class, diffusers.SchedulerMixin)):
            raise PriorError(
                f"{folder.path}/scheduler/scheduler_config.json names the scheduler {shown(name)}, which diffusers "
                f"{diffusers.__version__} does not have; name one of its own, such as DDIMScheduler"
            )
        scheduler: Any = scheduler_class.from_config(folder.settings("scheduler"))  # type: ignore[attr-defined]
    schedule = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(schedule, Tensor):
        raise PriorError(
            f"the scheduler of {folder.path} is a {name}, which has no alphas_cumprod: models trained by flow matching "
            "are not supported"
        )
    if schedule.ndim != 1 or not bool(((schedule >= 0) & (schedule <= 1)).all()):
        raise PriorError(f"the schedule of {folder.path} (alphas_cumprod) leaves [0, 1]; check scheduler_config.json")
    return scheduler


def prediction_type_of(scheduler: Any, folder: PipelineFolder) -> PredictionType:
    """The UNet's prediction type, from the scheduler's configuration or its class's default, else epsilon."""
    name = getattr(scheduler.config, "prediction_type", "epsilon")
    for known in get_args(PredictionType):
        if name == known:
            return known  # type: ignore[no-any-return]
    raise PriorError(
        f"{folder.path}/scheduler/scheduler_config.json has prediction_type {name!r}; "
        f"known are {', '.join(get_args(PredictionType))}"
    )


def process_of(scheduler: Any, folder: PipelineFolder, device: torch.device) -> Diffusion:
    """The process that the network was trained on, from its scheduler; its table is on `device`."""
    table: Tensor = scheduler.alphas_cumprod.to(device, torch.float32)
    return Diffusion(table, prediction_type_of(scheduler, folder))


def load_denoiser(folder: PipelineFolder, process: Process, dtype: torch.dtype, device: torch.device) -> UNet:
    """The UNet of the folder in `dtype` on `device`, frozen. Raises PriorError as `load_model` does."""
    from diffusers import UNet2DConditionModel

    space = LatentSpace(folder.latent_channels, folder.downscale, folder.native_resolution)
    # The smallest edge with which the deepest level still has several pixels, as in training.
    side = min(space.resolution // space.downscale, 2 ** len(folder.configs["unet"]["block_out_channels"]))

    def predict(unet: torch.nn.Module) -> None:
        like = next(unet.parameters())
        noisy = like.new_zeros(1, folder.latent_channels, side, side)
        text = like.new_zeros(1, 2, min(attended_widths(folder)))
        output = unet(noisy, like.new_zeros(1, dtype=torch.int64), encoder_hidden_states=text).sample
        _check_shape("unet", folder, output, noisy)

    return UNet(load_model(folder, "unet", UNet2DConditionModel, dtype, device, predict), space, process, dtype)


def load_codec(folder: PipelineFolder, dtype: torch.dtype, device: torch.device) -> Codec:
    config = folder.configs["vae"]
    if folder.patch_codec:
        return PatchCodec(
            int(config["patch_size"]), float(config["scaling_factor"]), float(config.get("detail_gain", 1.0))
        )
    from diffusers import AutoencoderKL

    def there_and_back(vae: torch.nn.Module) -> None:
        codec, like, side = VaeCodec(vae), next(vae.parameters()), 2 * folder.downscale
        latents, images = like.new_zeros(1, folder.latent_channels, 2, 2), like.new_zeros(1, 3, side, side)
        _check_shape("vae", folder, codec.encode(images), latents)
        _check_shape("vae", folder, codec.decode(latents), images)

    return VaeCodec(load_model(folder, "vae", AutoencoderKL, dtype, device, there_and_back))


def _check_shape(component: str, folder: PipelineFolder, found: Tensor, wanted: Tensor) -> None:
    if found.shape != wanted.shape:
        raise PriorError(
            f"the {component} in {folder.path} returns the shape {tuple(found.shape)} where its configuration promises "
            f"{tuple(wanted.shape)}; fetch or save the pipeline again"
        )
