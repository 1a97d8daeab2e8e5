from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distvsd.errors import PriorError
from distvsd.looking import describe_prior
from distvsd.prior import load_prior


def test_a_description_counts_what_loading_finds_and_is_json(shared_pipeline: Callable[..., Path]) -> None:
    from transformers import CLIPTextModel

    folder = shared_pipeline("sd21")
    described = describe_prior.describe(str(folder))
    prior = load_prior(str(folder), ["a red cube"])
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    parts = described["components"]
    assert parts["unet"]["parameters"] == sum(value.numel() for value in prior.denoiser.module.parameters())
    assert parts["vae"]["parameters"] == sum(value.numel() for value in prior.codec.vae.parameters())  # type: ignore[attr-defined]
    assert parts["text_encoder"]["parameters"] == sum(value.numel() for value in encoder.parameters())
    assert parts["unet"]["bytes"] == (folder / "unet/diffusion_pytorch_model.safetensors").stat().st_size
    assert [parts[name]["class"] for name in parts] == ["UNet2DConditionModel", "AutoencoderKL", "CLIPTextModel"]
    assert described["prediction_type"] == "v_prediction"
    assert described["timesteps"] == 1000
    assert described["latent_shape"] == list(prior.latent_shape(described["resolution"]))
    assert described["identity"] == prior.identity()
    assert not described["zero_terminal_snr"]
    assert json.loads(json.dumps(described)) == described


def test_a_codec_without_weights_has_no_parameters(shared_pipeline: Callable[..., Path]) -> None:
    described = describe_prior.describe(str(shared_pipeline("shapes")))
    assert described["components"]["vae"] == {"class": "PatchCodec", "parameters": 0, "bytes": 0, "dtype": None}
    assert described["zero_terminal_snr"]


def test_samples_are_written_as_a_grid_row_by_row(tmp_path: Path, shared_pipeline: Callable[..., Path]) -> None:
    out = tmp_path / "new" / "samples.png"
    images = describe_prior.sample(str(shared_pipeline("shapes")), "a red cube", 5, 3.0, 2, 0, out)
    grid = torch.from_numpy(np.asarray(Image.open(out)).copy()).permute(2, 0, 1) / 255
    assert grid.shape == (3, 2 * 32, 3 * 32)
    torch.testing.assert_close(grid[:, 32:, 32:64], images[4], atol=0.5 / 255 + 1e-6, rtol=0)
    torch.testing.assert_close(grid[:, :32, 64:], images[2], atol=0.5 / 255 + 1e-6, rtol=0)
    assert not grid[:, 32:, 64:].any()


def test_a_grid_of_nothing_and_a_file_that_is_no_png_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PriorError, match="0 samples"):
        describe_prior.sample("shapes", "a red cube", 0, 3.0, 2, 0, tmp_path / "out.png")
    with pytest.raises(PriorError, match=r"ends in \.png"):
        describe_prior.sample("shapes", "a red cube", 1, 3.0, 2, 0, tmp_path / "out.jpg")


def test_importing_the_room_loads_no_heavy_library() -> None:
    code = (
        "import sys, distvsd.prior, distvsd.networks.load, distvsd.looking.describe_prior, distvsd.testing.pipelines;"
        "print([name for name in ('diffusers', 'transformers', 'PIL') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
