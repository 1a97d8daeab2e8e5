"""Operations counted from shapes alone, against torch's own counter on networks that are really run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distvsd.networks.folder import open_folder
from distvsd.networks.operations import ATTENTION_BACKWARD, encoder_operations, unet_operations
from distvsd.networks.unet import UNet
from distvsd.prior import load_prior
from distvsd.score.adapter import adapted

TOKENS = 5
UNET: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32, 64, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "cross_attention_dim": 24,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}


def shapes_of(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def run_and_counted(call: Callable[[], Any]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("edge", [8, 16])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_linear_projection": True, "transformer_layers_per_block": (1, 3, 1)},
        {"layers_per_block": 1, "mid_block_type": "UNetMidBlock2D"},
    ],
)
def test_a_unet_takes_what_torch_counts(changes: dict[str, Any], edge: int) -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET | changes)
        noisy, time, text = torch.zeros(1, 4, edge, edge), torch.zeros(1), torch.zeros(1, TOKENS, 24)
    found = unet_operations(shapes_of(unet), TOKENS, UNet.lora_targets)
    assert found.forward(edge**2) == run_and_counted(lambda: unet(noisy, time, encoder_hidden_states=text))


@pytest.mark.parametrize("edge", [16, 32])
def test_an_encoder_takes_what_torch_counts(edge: int) -> None:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=[32, 64, 64],
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
            layers_per_block=1,
            norm_num_groups=8,
        )
        images = torch.zeros(1, 3, edge, edge)
    found = encoder_operations(shapes_of(vae))
    assert found.forward(edge**2) == run_and_counted(lambda: vae.encode(images))


def test_a_codec_without_weights_takes_no_products() -> None:
    assert encoder_operations({}).forward(64**2) == 0


def test_training_the_adapter_takes_what_torch_counts() -> None:
    """To 2 %: in which layers the first gradients are needed is not known from shapes."""
    from distvsd.config import ScoreConfig

    rank, edge = 4, 16
    prior, folder = load_prior("shapes", ["a red cube"]), open_folder("shapes")
    shapes = {name: header.shape for name, header in folder.weights["unet"].headers.items()}
    operations = unet_operations(shapes, folder.text_length, UNet.lora_targets)
    model, camera = adapted(prior.denoiser, ScoreConfig(rank=rank), 0, True, "cpu")
    network = prior.denoiser.on(model.get_base_model())
    condition = prior.condition(torch.tensor([0]), cameras=torch.zeros(1, 16))
    with FlopCounterMode(display=False) as counter:
        loss = network.predict(torch.zeros(1, 48, edge, edge), torch.tensor([3]), condition).square().mean()
        forward = counter.get_total_flops()
        loss.backward()
    # torch's counter leaves out attention on a CPU; the camera's two layers are not among the operations.
    attention, of_camera = operations.attention.at(edge**2), 2 * sum(value.numel() for value in camera.parameters())
    assert forward == pytest.approx(operations.forward(edge**2, rank) - attention + of_camera, rel=1e-4)
    backward = operations.backward(edge**2, rank) - ATTENTION_BACKWARD * attention
    assert counter.get_total_flops() - forward == pytest.approx(backward, rel=0.02)


def test_names_of_no_network_count_nothing() -> None:
    odd = {"": (2, 2), "down_blocks.99999999.x.weight": (1, 1), "up_blocks.3.upsamplers.0.conv.weight": (1, 1, 1, 1)}
    assert unet_operations(odd, TOKENS, UNet.lora_targets).attention.at(1) == 0
