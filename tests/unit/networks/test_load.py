from __future__ import annotations

import gc
import json
import re
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import distvsd.networks.text
from distvsd.looking import describe_prior
from distvsd.prior import Pipeline, load_prior
from distvsd.prior.prompts import VIEWS

LAYOUTS = ("sd15", "sd21", "shapes")
PROMPTS = ("a red cube", "a photo of the sphere", "")


@pytest.mark.parametrize("layout", ("sd15", "sd21"))
def test_prompts_are_encoded_as_stable_diffusion_pipeline_encodes_them(
    layout: str, shared_pipeline: Callable[..., Path]
) -> None:
    from diffusers import StableDiffusionPipeline

    folder = shared_pipeline(layout)
    reference = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    prior = load_prior(str(folder), PROMPTS, negative_prompt="blurry, grey")
    for index, prompt in enumerate(PROMPTS):
        wanted, negative = reference.encode_prompt(prompt, "cpu", 1, True, negative_prompt="blurry, grey")
        torch.testing.assert_close(prior.texts.bare(torch.tensor([index])).text, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(prior.texts.negative(1).text, negative, rtol=1e-5, atol=1e-5)
    viewed, _ = reference.encode_prompt("a red cube, side view", "cpu", 1, False)
    side = torch.tensor([VIEWS.index("side view")])
    torch.testing.assert_close(prior.texts.viewed(torch.tensor([0]), side).text, viewed, rtol=1e-5, atol=1e-5)


def test_the_embedded_layout_encodes_prompts_with_its_own_tokenizer(shared_pipeline: Callable[..., Path]) -> None:
    from transformers import AutoTokenizer, CLIPTextModel

    folder = shared_pipeline("shapes")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    ids = tokenizer(["a red cube, back view"], padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()(ids).last_hidden_state
    prior = load_prior(str(folder), ["a red cube"])
    viewed = prior.texts.viewed(torch.tensor([0]), torch.tensor([VIEWS.index("back view")])).text
    assert viewed.shape[1] == 16
    torch.testing.assert_close(viewed, wanted, rtol=1e-5, atol=1e-5)


def test_an_encoder_with_projection_gives_the_states_of_its_tokens_not_the_pooled_vector(
    own_pipeline: Callable[..., Path],
) -> None:
    folder = own_pipeline("sd15")
    plain = load_prior(str(folder), ["a red cube"]).texts.bare(torch.tensor([0])).text
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "CLIPTextModelWithProjection"]
    (folder / "model_index.json").write_text(json.dumps(index))
    weights = {name: value.clone() for name, value in load_file(folder / "text_encoder/model.safetensors").items()}
    weights["text_projection.weight"] = torch.eye(32)
    save_file(weights, folder / "text_encoder/model.safetensors", metadata={"format": "pt"})
    projected = load_prior(str(folder), ["a red cube"]).texts.bare(torch.tensor([0])).text
    torch.testing.assert_close(projected, plain)


def test_the_text_encoder_is_freed_before_the_prior_is_returned(
    monkeypatch: pytest.MonkeyPatch, shared_pipeline: Callable[..., Path]
) -> None:
    encoders: list[weakref.ref[torch.nn.Module]] = []
    load_model = distvsd.networks.text.load_model

    def load_and_watch(*arguments: object) -> torch.nn.Module:
        model = load_model(*arguments)  # type: ignore[arg-type]
        encoders.append(weakref.ref(model))
        return model

    monkeypatch.setattr(distvsd.networks.text, "load_model", load_and_watch)
    # The garbage collector is off, to test that it is freed at once and not at some later time.
    gc.disable()
    try:
        prior = load_prior(str(shared_pipeline("shapes")), ["a red cube"])
        assert [encoder() for encoder in encoders] == [None]
    finally:
        gc.enable()
    assert prior.texts.bare(torch.tensor([0])).text.isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything_is_frozen(layout: str, shared_prior: Callable[..., Pipeline]) -> None:
    prior = shared_prior(layout)
    modules = [prior.denoiser.module, prior.codec]
    assert all(not parameter.requires_grad for module in modules for parameter in module.parameters())  # type: ignore[attr-defined]
    assert all(not part.training for part in prior.denoiser.module.modules())
    assert not prior.texts.negative(1).text.requires_grad


def test_the_schedule_is_the_one_the_scheduler_class_computes(shared_prior: Callable[..., Pipeline]) -> None:
    prior = shared_prior("sd15")
    # Stable Diffusion's schedule by its formula: square roots of the betas are evenly spaced.
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    wanted = (1 - betas).cumprod(0).float()
    assert prior.process.alphas_cumprod.dtype == torch.float32
    torch.testing.assert_close(prior.process.alphas_cumprod, wanted, rtol=1e-4, atol=1e-6)
    assert shared_prior("shapes").process.alphas_cumprod[-1] == 0


@pytest.mark.parametrize("name", ("float16", "bfloat16"))
def test_half_precision_holds_the_networks_and_texts_and_nothing_else(
    name: str, shared_pipeline: Callable[..., Path]
) -> None:
    prior = load_prior(str(shared_pipeline("sd21")), ["a red cube"], dtype=name)
    half = getattr(torch, name)
    assert {parameter.dtype for parameter in prior.denoiser.module.parameters()} == {half}
    assert prior.texts.negative(1).text.dtype == half
    assert prior.process.alphas_cumprod.dtype == torch.float32
    assert prior.encode(torch.full((1, 3, 64, 64), 0.3)).dtype == torch.float32
    condition, t = prior.condition(torch.tensor([0])), torch.tensor([500])
    assert prior.guided_output(torch.ones(1, 4, 8, 8), t, condition, 7.5).dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_a_long_prompt_warns_with_both_token_counts_and_a_short_one_does_not(
    shared_pipeline: Callable[..., Path],
) -> None:
    folder = str(shared_pipeline("sd15"))
    # 90 words of one token each, plus the begin and end tokens: 92.
    with pytest.warns(UserWarning, match=r"reads 77 tokens.*has 92 tokens"):
        load_prior(folder, [" ".join(["red"] * 90)], view_dependent=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_prior(folder, [" ".join(["red"] * 75)], view_dependent=False)


def test_a_prompt_that_only_a_view_makes_too_long_is_warned_of(shared_pipeline: Callable[..., Path]) -> None:
    with pytest.warns(UserWarning, match="front view' has 78 tokens"):
        load_prior(str(shared_pipeline("sd15")), [" ".join(["red"] * 73)])


def test_weights_saved_only_as_the_fp16_variant_load(own_pipeline: Callable[..., Path]) -> None:
    folder = own_pipeline("sd15")
    wanted = load_prior(str(folder), ["a red cube"], dtype="float16")
    for component, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        source = folder / component / f"{stem}.safetensors"
        weights = {name: _halved(value) for name, value in load_file(source).items()}
        save_file(weights, source.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        source.unlink()
    loaded = load_prior(str(folder), ["a red cube"], dtype="float16")
    for one, other in zip(wanted.denoiser.module.parameters(), loaded.denoiser.module.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.guarantee("G35")
def test_the_identity_follows_the_content_and_not_the_place_dtype_or_prompt(
    shared_pipeline: Callable[..., Path], own_pipeline: Callable[..., Path]
) -> None:
    """A prior's identity is that of its weights, configuration and tokenizer, wherever they lie."""
    shared, own = shared_pipeline("shapes"), own_pipeline("shapes")
    identity = load_prior(str(shared), ["a red cube"]).identity()
    assert re.fullmatch("v2:[0-9a-f]{64}", identity)
    assert load_prior(str(own), ["another"], dtype="float16").identity() == identity
    words = own / "tokenizer/tokenizer.json"
    before = words.read_text(encoding="utf-8")
    assert '"cube"' in before
    words.write_text(before.replace('"cube"', '"cubes"'), encoding="utf-8")
    assert describe_prior.describe(str(own))["identity"] != identity
    words.write_text(before, encoding="utf-8")
    assert describe_prior.describe(str(own))["identity"] == identity
    weights = {
        name: value.clone() for name, value in load_file(own / "unet/diffusion_pytorch_model.safetensors").items()
    }
    weights["conv_in.bias"][0] += 1e-3
    save_file(weights, own / "unet/diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    assert load_prior(str(own), ["a red cube"]).identity() != identity


def test_loading_prints_nothing(capfd: pytest.CaptureFixture[str], shared_pipeline: Callable[..., Path]) -> None:
    load_prior(str(shared_pipeline("sd15")), ["a red cube"])
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_the_embedded_prior_draws_red_things_when_asked_for_red() -> None:
    prior = load_prior("shapes", ["a red cube", "a blue cube"])
    assert prior.latent_shape(prior.resolution)[0] == prior.encode(torch.zeros(1, 3, 64, 64)).shape[1]
    images = prior.sample(["a red cube", "a blue cube"], 4, guidance_scale=3.0, steps=8, seed=0)
    middle = images[:, :, 24:40, 24:40].mean(dim=(2, 3))
    redness = middle[:, 0] - middle[:, 2]
    assert (redness[0::2] > 0).all()
    assert (redness[1::2] < 0).all()


def _halved(value: Tensor) -> Tensor:
    return value.half() if value.is_floating_point() else value.clone()
