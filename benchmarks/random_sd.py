"""A pipeline of Stable Diffusion 2.1's sizes with random weights, to measure time and memory without a network.

Its images mean nothing. The text encoder has one layer of the right width, since texts are encoded once, before the
first round.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from distvsd.networks.components import quiet
from distvsd.testing.pipelines import tiny_pipeline
from distvsd.vsd.rng import Purpose, seeded

UNET: dict[str, Any] = {
    "sample_size": 64,  # as in stable-diffusion-2-1-base: images of 512 pixels
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
# The same layout in a moment, for trying the scripts out; 64 pixels.
SMALL_UNET = UNET | {"sample_size": 8, "block_out_channels": [16] * 4, "attention_head_dim": [2] * 4}
SMALL_UNET |= {"norm_num_groups": 8, "layers_per_block": 1, "cross_attention_dim": 32}
SMALL_VAE = VAE | {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 64}


def random_sd21(folder: Path, smoke: bool, device: torch.device) -> Path:
    """Writes the pipeline to the folder (2 GB in bfloat16; smoke: 1 MB) and returns it; weights are made on device."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tiny_pipeline(folder, "sd21")
    text = json.loads((folder / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    width = (SMALL_UNET if smoke else UNET)["cross_attention_dim"]
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 1, "projection_dim": width}
    with quiet(), seeded(0, Purpose.BUILD), torch.device(device):
        networks = {
            "unet": UNet2DConditionModel(**(SMALL_UNET if smoke else UNET)),
            "vae": AutoencoderKL(**(SMALL_VAE if smoke else VAE)),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**(text | sizes | {"num_attention_heads": 4}))),
        }
        for name, network in networks.items():
            shutil.rmtree(folder / name)
            network.to(torch.bfloat16).save_pretrained(folder / name, safe_serialization=True)
    return folder
