"""The sizes of public models, so that a plan needs no weights.

Counted by their diffusers and transformers classes from the config.json of each component, as the models' repositories
publish them; tests/unit/plan has those configurations and counts again. Tables of constants, such as positions, are
among the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from distvsd.networks.operations import NetworkOperations, Operations


@dataclass(frozen=True)
class Published:
    """One model. denoiser, vae, text: how many numbers each of them has, all text encoders together. resolution: native
    pixels a side. time_width: of the vector to which the camera is added. attention: layers that get an adapter, as
    (outputs, inputs, how many). network, encoder: operations of a sample with a text of 77 tokens; None where they were
    not counted. missing: why this version cannot train with it, "" where it can.
    """

    source: str
    latent_channels: int
    downscale: int
    resolution: int
    denoiser: int
    vae: int
    text: int
    time_width: int
    attention: tuple[tuple[int, int, int], ...]
    network: NetworkOperations | None = None
    encoder: NetworkOperations | None = None
    missing: str = ""


def _stable_diffusion(text: int) -> tuple[tuple[int, int, int], ...]:
    """Of the UNet of Stable Diffusion 1 and 2, whose text has this width."""
    widths = (320, 640, 1280)
    alone = tuple((width, width, count) for width, count in zip(widths, (30, 30, 36), strict=True))
    return alone + tuple((width, text, count) for width, count in zip(widths, (10, 10, 12), strict=True))


def _unet(layers: Operations, adapter: Operations, attention: tuple[float, float]) -> NetworkOperations:
    """attention: over the text for each pixel, over the pixels for each pair of them."""
    return NetworkOperations(layers, Operations(0.0, *attention), adapter, first=1_866_240.0)


def _encoder(pixel: float) -> NetworkOperations:
    """Of an AutoencoderKL, for each pixel of the image; it attends over pixels of 8 x 8 with 512 channels."""
    return NetworkOperations(Operations(pixel=pixel), Operations(pair=0.5), Operations())


PUBLISHED = {
    "sd-1.5": Published(
        source="stable-diffusion-v1-5/stable-diffusion-v1-5",
        latent_channels=4,
        downscale=8,
        resolution=512,
        denoiser=859_520_964,
        vae=83_653_863,
        text=123_060_480,
        time_width=1280,
        attention=_stable_diffusion(768),
        network=_unet(
            Operations(3_007_774_720.0, 164_602_880.0), Operations(7_628_544.0, 67_680.0), (868_560.0, 7301.25)
        ),
        encoder=_encoder(4_128_642.0),
    ),
    "sd-2.1": Published(
        source="stabilityai/stable-diffusion-2-1",
        latent_channels=4,
        downscale=8,
        resolution=768,
        denoiser=865_910_724,
        vae=83_653_863,
        text=340_387_840,
        time_width=1280,
        attention=_stable_diffusion(1024),
        network=_unet(
            Operations(3_991_797_760.0, 164_602_880.0), Operations(8_890_112.0, 67_680.0), (868_560.0, 7301.25)
        ),
        encoder=_encoder(4_128_642.0),
    ),
    "sdxl": Published(
        source="stabilityai/stable-diffusion-xl-base-1.0",
        latent_channels=4,
        downscale=8,
        resolution=1024,
        denoiser=2_567_463_684,
        vae=83_653_863,
        text=123_060_480 + 694_659_840,
        time_width=1280,
        attention=((640, 640, 60), (1280, 1280, 360), (640, 2048, 20), (1280, 2048, 120)),
        network=_unet(
            Operations(52_531_036_160.0, 361_620_480.0), Operations(69_780_480.0, 153_600.0), (1_971_200.0, 2800.0)
        ),
        encoder=_encoder(4_128_642.0),
        missing="its UNet wants a pooled text and the sizes of the image",
    ),
    "sd-3": Published(
        source="stabilityai/stable-diffusion-3-medium-diffusers",
        latent_channels=16,
        downscale=8,
        resolution=1024,
        denoiser=2_084_951_104,
        vae=83_819_683,
        text=123_650_304 + 694_659_840 + 4_762_310_656,
        time_width=1536,
        attention=((1536, 1536, 96),),
        encoder=_encoder(4_132_096.0),
        missing="its network is a transformer that was trained by flow matching",
    ),
}
