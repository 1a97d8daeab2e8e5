"""The sizes of public models, counted again on instances of the models' own classes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from distvsd.cli import main
from distvsd.config import Config, load_config
from distvsd.networks.operations import encoder_operations, unet_operations
from distvsd.networks.unet import UNet
from distvsd.plan.prior import prior_sizes
from distvsd.plan.published import PUBLISHED
from distvsd.plan.text import draw
from distvsd.run.planned import plan_run
from distvsd.score.camera import CameraEmbedding
from tests.unit.plan.published_configs import CONFIGS

PAPER = Path(__file__).parents[3] / "configs" / "prolificdreamer.yaml"


def made(model: str, part: str) -> torch.nn.Module:
    """A component made by its own class from its configuration, on the meta device."""
    import diffusers
    import transformers

    kind, settings = CONFIGS[model][part]
    with torch.device("meta"):
        if hasattr(diffusers, kind):
            network: torch.nn.Module = getattr(diffusers, kind)(**settings)
        else:
            network_class = getattr(transformers, kind)
            network = network_class(network_class.config_class(**settings))
    return network


def numbers(network: torch.nn.Module) -> int:
    """The number of parameters and saved buffers; a tensor with two names counts once."""
    saved = network.state_dict(keep_vars=True).values()
    return sum({id(value): value.numel() for value in saved}.values())


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_published_numbers_are_those_of_the_classes(model: str) -> None:
    published = PUBLISHED[model]
    assert published.denoiser == numbers(made(model, "denoiser"))
    assert published.vae == numbers(made(model, "vae"))
    assert published.text == sum(numbers(made(model, part)) for part in CONFIGS[model] if part.startswith("text"))


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_published_operations_are_those_of_the_shapes(model: str) -> None:
    def shapes(part: str) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in made(model, part).state_dict().items()}

    published = PUBLISHED[model]
    assert published.encoder == encoder_operations(shapes("vae"))
    if published.network is not None:
        assert published.network == unet_operations(shapes("denoiser"), 77, UNet.lora_targets)
    assert (published.network is None) == ("transformer" in published.missing)


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_published_shapes_are_those_of_the_configurations(model: str) -> None:
    published = PUBLISHED[model]
    denoiser, vae = CONFIGS[model]["denoiser"][1], CONFIGS[model]["vae"][1]
    assert published.latent_channels == denoiser["in_channels"] == vae["latent_channels"]
    assert published.downscale == 2 ** (len(vae["block_out_channels"]) - 1)
    assert published.resolution == denoiser["sample_size"] * published.downscale


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_layers_with_an_adapter_are_those_of_the_network(model: str) -> None:
    network = made(model, "denoiser")
    ends = tuple(f".{target}.weight" for target in UNet.lora_targets)
    layers = Counter(tuple(value.shape) for name, value in network.named_parameters() if name.endswith(ends))
    assert layers == {(rows, columns): count for rows, columns, count in PUBLISHED[model].attention}
    embedding = next(
        value for name, value in network.named_parameters() if "embed" in name and "linear_2.weight" in name
    )
    assert len(embedding) == PUBLISHED[model].time_width


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_adapter_is_counted_as_peft_makes_it(model: str) -> None:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=4, target_modules=list(UNet.lora_targets))
    adapted = get_peft_model(made(model, "denoiser"), settings)  # type: ignore[arg-type]
    adapter = sum(value.numel() for name, value in adapted.named_parameters() if ".lora_" in name)
    assert prior_sizes(Config(), model).adapter_parameters == adapter


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_camera_embedding_is_as_wide_as_what_it_is_added_to(model: str) -> None:
    camera = CameraEmbedding(PUBLISHED[model].time_width)
    assert prior_sizes(Config(), model).camera_parameters == sum(value.numel() for value in camera.parameters())


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_plan_for_a_public_model_leaves_nothing_unknown_and_needs_no_weights(model: str) -> None:
    images = ["stages=[]", "particles.kind=image", "particles.image.space=latent", "render.resolution=512"]
    config = load_config(PAPER, images)
    for planned in (config, load_config(PAPER)):
        plan = plan_run(planned, 2, 4, published=model)
        text = draw(plan)
        assert "unknown" not in text and "None" not in text and PUBLISHED[model].source in text
        assert ("cannot train" in text) == bool(PUBLISHED[model].missing)
        # Nothing is paged, and a run may never end.
        assert _nones(plan) <= {"prior.problem", "failures.hours_with_failures", "paging"}


def _nones(plan: dict[str, Any], prefix: str = "") -> set[str]:
    found = set()
    for key, value in plan.items():
        if isinstance(value, dict):
            found |= _nones(value, f"{prefix}{key}.")
        elif value is None:
            found.add(prefix + key)
    return found


def test_half_precision_takes_half_the_bytes() -> None:
    single, half = (load_config(PAPER, [f"prior.dtype={dtype}"]) for dtype in ("float32", "bfloat16"))
    assert prior_sizes(single, "sdxl").weight_bytes == 2 * prior_sizes(half, "sdxl").weight_bytes


def test_the_command_line_knows_the_public_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(PAPER), "--as", "sd-2.1"]) == 0
    assert "stable-diffusion-2-1" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main(["plan", str(PAPER), "--as", "sd-9"])
    assert caught.value.code == 2 and "sd-2.1" in capsys.readouterr().err
