"""A tiny UNet and random batches for the score network's tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from distvsd.config import ScoreConfig
from distvsd.networks.base import Condition, LatentSpace
from distvsd.networks.unet import UNet
from distvsd.parallel.world import World
from distvsd.score.lora import LoraScore
from distvsd.score.replay import Replay
from distvsd.score.sharing import Everywhere
from distvsd.score.strategies.flat import Flat
from distvsd.score.training import ScoreTraining
from distvsd.vsd import rng
from distvsd.vsd.process import Diffusion
from distvsd.vsd.rng import Purpose
from distvsd.vsd.samples import Samples

NUM_TIMESTEPS = 100
ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


@dataclass(frozen=True)
class Batch:
    """The arguments of `loss`."""

    samples: Samples
    times: Tensor
    noise: Tensor
    keep_camera: Tensor

    def arguments(self) -> tuple[Samples, Tensor, Tensor, Tensor]:
        return self.samples, self.times, self.noise, self.keep_camera


@dataclass(frozen=True)
class Sum:
    gradient: Tensor
    sums: Tensor
    usable: bool


@dataclass
class OneRank:
    """The reduction of a world of one rank, which records its inputs."""

    gradients: list[Tensor] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    def __call__(self, vectors: Sequence[Tensor], *, extra_sums: Tensor) -> Sum:
        total = torch.stack(list(vectors)).sum(0)
        self.gradients.append(total)
        self.rows.append(len(extra_sums))
        usable = bool(total.isfinite().all() and extra_sums.isfinite().all())
        return Sum(total, extra_sums.sum(0), usable)


def training(
    score: LoraScore,
    reduce: Any,
    share: Callable[[int], slice] = lambda n: slice(0, n),
    num_views: int = 1,
    replay_rounds: int = 2,
    **options: Any,
) -> ScoreTraining:
    settings = {"learning_rate": 1e-2, "camera_drop": 0.0} | options
    return ScoreTraining(
        score=score,
        strategy=Flat(reduce, score.local),
        sharing=Everywhere(ALONE, share),
        config=ScoreConfig(**settings),
        seed=3,
        num_particles=100,
        num_views=num_views,
        micro_batch=0,
        replay=Replay(replay_rounds, num_views),
    )


def draw(lane: int, *shape: int) -> Tensor:
    return rng.normal(11, Purpose.SAMPLE, [0], 0, shape, lane)[0]


def text_of(ids: Tensor) -> Condition:
    """One of eight texts for each particle, [N, 3, 8]."""
    return Condition(draw(1, 8, 3, 8).to(ids.device)[ids % 8])


def denoiser_of(unet: Any, prediction_type: Any = "epsilon") -> UNet:
    process = Diffusion(torch.linspace(0.99, 0.01, NUM_TIMESTEPS), prediction_type)
    return UNet(unet, LatentSpace(4, 8, 64), process, next(unet.parameters()).dtype)


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
        settings = {"rank": 2, "init": "kaiming", "warmup": 0} | options
        score = LoraScore(
            base=denoiser_of(unet, prediction_type),
            text_of=text_of,
            config=ScoreConfig(**settings),
            seed=seed,
            device="cpu",
            micro_batch=micro_batch,
            reads_cameras=reads_cameras,
        )
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
