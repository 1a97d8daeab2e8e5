"""A tiny UNet and random batches for the score network's tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from distvsd.score.lora import LoraScore
from distvsd.vsd import rng
from distvsd.vsd.rng import Purpose
from distvsd.vsd.samples import Samples

NUM_TIMESTEPS = 100


@dataclass(frozen=True)
class Options:
    """The fields of the configuration that the score network reads."""

    rank: int = 2
    init: str = "kaiming"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup: int = 0
    weight_decay: float = 1e-2
    max_grad_norm: float = 0.0
    replay_rounds: int = 2


@dataclass(frozen=True)
class Batch:
    """The arguments of `loss`."""

    samples: Samples
    timesteps: Tensor
    noise: Tensor
    keep_camera: Tensor

    def arguments(self) -> tuple[Samples, Tensor, Tensor, Tensor]:
        return self.samples, self.timesteps, self.noise, self.keep_camera


def draw(lane: int, *shape: int) -> Tensor:
    return rng.normal(11, Purpose.SAMPLE, [0], 0, shape, lane)[0]


def text_of(ids: Tensor) -> Tensor:
    """One text for each of eight particles, [N, 3, 8]."""
    return draw(1, 8, 3, 8).to(ids.device)[ids]


@pytest.fixture
def unet() -> Any:
    return tiny_unet()


def tiny_unet(**changes: object) -> Any:
    from diffusers import UNet2DConditionModel

    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 8,
        "attention_head_dim": 4,
    }
    with rng.seeded(3, Purpose.SAMPLE):
        unet = UNet2DConditionModel(**(settings | changes))
    return unet.requires_grad_(False).eval()


@pytest.fixture
def make_unet() -> Callable[..., Any]:
    return tiny_unet


@pytest.fixture
def make_score() -> Callable[..., LoraScore]:
    def make(
        unet: Any,
        prediction_type: Any = "epsilon",
        seed: int = 5,
        micro_batch: int = 0,
        shaken: bool = False,
        reads_cameras: bool = True,
        **options: Any,
    ) -> LoraScore:
        """shaken: every trained number is random, as if trained, so that no gradient is zero by initialisation."""
        abar = torch.linspace(0.99, 0.01, NUM_TIMESTEPS)
        settings = Options(**options)
        score = LoraScore(unet, abar, prediction_type, text_of, settings, seed, "cpu", micro_batch, reads_cameras)
        if shaken:
            with torch.no_grad():
                for index, parameter in enumerate(score.trainable.values()):
                    parameter.copy_(0.3 * draw(100 + index, *parameter.shape))
        return score

    return make


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    def make(count: int = 5) -> Batch:
        samples = Samples(
            latents=draw(2, count, 4, 8, 8),
            cameras=draw(3, count, 16),
            ids=torch.arange(count) % 8,
            views=torch.zeros(count, dtype=torch.int64),
            weight=torch.ones(count),
        )
        timesteps = (torch.arange(count) * 37 + 1) % NUM_TIMESTEPS
        return Batch(samples, timesteps, draw(4, count, 4, 8, 8), torch.ones(count, dtype=torch.bool))

    return make
