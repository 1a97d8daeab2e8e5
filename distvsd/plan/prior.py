"""The sizes of the prior that a plan needs: from its folder, or the published ones of a public model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from distvsd.config import Config
from distvsd.errors import PriorError
from distvsd.networks.folder import PipelineFolder, open_folder
from distvsd.networks.operations import NetworkOperations, encoder_operations, unet_operations
from distvsd.networks.unet import TIME_EMBEDDING, UNet
from distvsd.plan.published import PUBLISHED, Published
from distvsd.score.stored import Shapes, trainable_of

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class PriorSizes:
    """latent_channels; downscale: image pixels a side of a latent pixel; resolution: pixels a side that the network was
    trained at. weight_bytes: of all files, unet_bytes: of the network's alone. adapter_parameters, camera_parameters:
    trained beside it. score_base_bytes: of the network that the score adapts where it is another than the prior's, else
    0. network, score_network, encoder: operations of a sample through the prior's network, the score's and the
    encoder. None where the prior is not here; problem then says why. path: its name in the plan.
    """

    path: str
    problem: str | None = None
    latent_channels: int | None = None
    downscale: int | None = None
    resolution: int | None = None
    weight_bytes: int | None = None
    unet_bytes: int | None = None
    adapter_parameters: int | None = None
    camera_parameters: int | None = None
    note: str | None = None
    score_base_bytes: int = 0
    network: NetworkOperations | None = None
    score_network: NetworkOperations | None = None
    encoder: NetworkOperations | None = None

    def latent_shape(self, edge: int) -> tuple[int, int, int] | None:
        """Of an image with this edge in pixels; None where the prior is not here."""
        if self.latent_channels is None or self.downscale is None:
            return None
        return self.latent_channels, edge // self.downscale, edge // self.downscale


def prior_sizes(config: Config, published: str | None = None) -> PriorSizes:
    """Sizes of prior.path, or of a public model by its name in `PUBLISHED`. Reads configurations and headers only."""
    if published is not None:
        return _published(config, PUBLISHED[published])
    try:
        folder = open_folder(config.prior.path)
        base = open_folder(config.score.base) if config.score.base else None
        adapter, camera = _trained(config, _shapes(base or folder))
        network = _operations(folder)
        score_network = _operations(base) if base else network
        encoder = encoder_operations(_shapes(folder, "vae"))
    except PriorError as error:
        return PriorSizes(config.prior.path, str(error))
    return PriorSizes(
        path=config.prior.path,
        latent_channels=folder.latent_channels,
        downscale=folder.downscale,
        resolution=folder.native_resolution,
        weight_bytes=sum(weights.num_bytes for weights in folder.weights.values()),
        unet_bytes=folder.weights["unet"].num_bytes,
        adapter_parameters=adapter,
        camera_parameters=camera,
        score_base_bytes=base.weights["unet"].num_bytes if base else 0,
        network=network,
        score_network=score_network,
        encoder=encoder,
    )


def _published(config: Config, model: Published) -> PriorSizes:
    size = _BYTES[config.prior.dtype]
    adapter, camera = _trained(config, dict(_attention(model)) | {TIME_EMBEDDING: (model.time_width,) * 2})
    numbers = model.denoiser + model.vae + model.text
    note = f"the published sizes of {model.source}, {numbers:,} numbers in {config.prior.dtype}"
    if model.missing:
        note += f"; this version cannot train with it: {model.missing}"
    return PriorSizes(
        path=model.source,
        latent_channels=model.latent_channels,
        downscale=model.downscale,
        resolution=model.resolution,
        weight_bytes=numbers * size,
        unet_bytes=model.denoiser * size,
        adapter_parameters=adapter,
        camera_parameters=camera,
        note=note,
        network=model.network,
        score_network=model.network,
        encoder=model.encoder,
    )


def _operations(folder: PipelineFolder) -> NetworkOperations:
    return unet_operations(_shapes(folder), folder.text_length, UNet.lora_targets)


def _shapes(folder: PipelineFolder, component: str = "unet") -> Shapes:
    """None of a component without weights."""
    weights = folder.weights.get(component)
    return {} if weights is None else {name: header.shape for name, header in weights.headers.items()}


def _attention(model: Published) -> Iterator[tuple[str, tuple[int, int]]]:
    for kind, (rows, columns, count) in enumerate(model.attention):
        for layer in range(count):
            yield f"{kind}.{layer}.to_q.weight", (rows, columns)


def _trained(config: Config, shapes: Shapes) -> tuple[int, int]:
    """Numbers in the adapter and in the camera embedding of a network with these shapes."""
    trainable = trainable_of(shapes, config.score.rank, config.reads_cameras)
    camera = sum(math.prod(shape) for name, shape in trainable.items() if name.startswith("camera."))
    return sum(map(math.prod, trainable.values())) - camera, camera
