from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import distvsd.networks.folder
import distvsd.shapes
from distvsd.errors import PriorError
from distvsd.prior import load_prior

UNET = "unet/diffusion_pytorch_model.safetensors"


def refusal(path: str | Path, **options: Any) -> str:
    with pytest.raises(PriorError) as caught:
        load_prior(str(path), ["a red cube"], **options)
    return str(caught.value)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = {name: value.clone() for name, value in load_file(path).items()}
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nothing")
    assert "there is no folder" in message
    assert "nothing" in message


def test_a_name_on_the_hub_says_that_nothing_is_downloaded_and_how_to_get_a_local_folder() -> None:
    message = refusal("some-user/stable-diffusion")
    assert "nothing is downloaded" in message
    assert "hf download some-user/stable-diffusion" in message
    assert "local folder" in message


def test_a_single_file_is_not_a_pipeline(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert "is a file" in refusal(file)


def test_an_empty_folder_says_every_file_that_is_missing(tmp_path: Path) -> None:
    message = refusal(tmp_path)
    for name in (
        "model_index.json",
        "unet/config.json",
        "scheduler/scheduler_config.json",
        "vae/config.json",
        "tokenizer",
    ):
        assert name in message


@pytest.mark.parametrize(
    "name",
    ("model_index.json", "unet/config.json", UNET, "text_encoder/model.safetensors", "vae/config.json"),
)
def test_a_missing_file_is_named(name: str, own_pipeline: Callable[..., Path]) -> None:
    folder = own_pipeline("sd15")
    (folder / name).unlink()
    message = refusal(folder)
    assert name in message
    assert "missing" in message


@pytest.mark.guarantee("G32")
def test_weights_that_are_only_a_pickle_are_not_read(own_pipeline: Callable[..., Path]) -> None:
    """A prior whose weights are a pickle is refused, not unpickled."""
    folder = own_pipeline("sd15")
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.bin")
    message = refusal(folder)
    assert "diffusion_pytorch_model.bin, a pickle" in message
    assert "safe_serialization" in message


def test_a_list_of_shards_with_one_missing_names_it(own_pipeline: Callable[..., Path]) -> None:
    folder = own_pipeline("sd15")
    (folder / UNET).unlink()
    index = {"weight_map": {"conv_in.weight": "part-00001.safetensors"}}
    (folder / f"{UNET}.index.json").write_text(json.dumps(index))
    assert "not there: part-00001.safetensors" in refusal(folder)


def test_sdxl_is_refused_by_name(own_pipeline: Callable[..., Path]) -> None:
    folder = own_pipeline("sd15")
    second = {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
    change(folder / "model_index.json", _class_name="StableDiffusionXLPipeline", **second)
    message = refusal(folder)
    assert "StableDiffusionXLPipeline" in message
    assert "text_encoder_2" in message


def test_a_pipeline_with_a_transformer_is_refused_by_name(tmp_path: Path) -> None:
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    message = refusal(tmp_path)
    assert "FluxPipeline (with transformer)" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("addition_embed_type", "text_time"),
        ("class_embed_type", "projection"),
        ("num_class_embeds", 10),
        ("encoder_hid_dim", 64),
        ("time_cond_proj_dim", 256),
    ],
)
def test_a_unet_with_other_conditions_is_refused_and_the_condition_is_named(
    key: str, value: object, own_pipeline: Callable[..., Path]
) -> None:
    folder = own_pipeline("sd15")
    change(folder / "unet/config.json", **{key: value})
    message = refusal(folder)
    assert f"{key} = {value!r}" in message
    assert "not supported" in message


def test_an_unknown_prediction_type_is_refused_with_the_known_ones(own_pipeline: Callable[..., Path]) -> None:
    folder = own_pipeline("sd15")
    change(folder / "scheduler/scheduler_config.json", prediction_type="velocity")
    message = refusal(folder)
    assert "'velocity'" in message
    assert "epsilon, v_prediction, sample" in message


def test_an_unknown_scheduler_and_one_of_flow_matching_are_refused(own_pipeline: Callable[..., Path]) -> None:
    folder = own_pipeline("sd15")
    change(folder / "scheduler/scheduler_config.json", _class_name="MyScheduler")
    assert "'MyScheduler'" in refusal(folder)
    (folder / "scheduler/scheduler_config.json").write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}')
    assert "flow matching" in refusal(folder)


def test_weights_of_another_shape_name_the_tensor_and_both_shapes(own_pipeline: Callable[..., Path]) -> None:
    folder = own_pipeline("sd15")
    change_weights(folder / UNET, lambda weights: weights.update({"conv_in.weight": torch.zeros(16, 4, 1, 1)}))
    message = refusal(folder)
    assert "conv_in.weight is (16, 4, 1, 1) in the file and (16, 4, 3, 3)" in message
    assert "unet" in message


@pytest.mark.parametrize(
    ("component", "file", "name"),
    [
        ("unet", UNET, "conv_out.bias"),
        ("vae", "vae/diffusion_pytorch_model.safetensors", "quant_conv.weight"),
        ("text_encoder", "text_encoder/model.safetensors", "text_model.final_layer_norm.weight"),
    ],
)
def test_a_missing_tensor_is_named_instead_of_drawn_at_random(
    component: str, file: str, name: str, own_pipeline: Callable[..., Path]
) -> None:
    folder = own_pipeline("sd15")
    change_weights(folder / file, lambda weights: weights.pop(name))
    message = refusal(folder)
    assert f"{name.removeprefix('text_model.')} is missing" in message
    assert component in message


@pytest.mark.parametrize(
    ("component", "file", "name"),
    [
        ("unet", UNET, "conv_out.bias"),
        ("vae", "vae/diffusion_pytorch_model.safetensors", "decoder.conv_in.weight"),
        ("text_encoder", "text_encoder/model.safetensors", "text_model.final_layer_norm.weight"),
    ],
)
@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("-inf"), "infinite")])
def test_one_value_that_is_not_finite_is_refused_with_its_tensor_and_component(
    component: str, file: str, name: str, value: float, word: str, own_pipeline: Callable[..., Path]
) -> None:
    folder = own_pipeline("sd15")
    change_weights(folder / file, lambda weights: weights[name].view(-1)[3].fill_(value))
    message = refusal(folder)
    assert f"the {component} in" in message
    assert f"{word} values in " in message
    assert name.removeprefix("text_model.") in message


def test_a_weight_too_large_for_half_precision_is_refused_there_and_accepted_in_float32(
    own_pipeline: Callable[..., Path],
) -> None:
    folder = own_pipeline("shapes")
    change_weights(folder / UNET, lambda weights: weights["conv_out.bias"][0].fill_(1e5))
    assert "infinite values in conv_out.bias, read as torch.float16" in refusal(folder, dtype="float16")
    load_prior(str(folder), ["a red cube"])


def test_a_damaged_weight_file_is_refused(own_pipeline: Callable[..., Path]) -> None:
    folder = own_pipeline("sd15")
    (folder / UNET).write_bytes((folder / UNET).read_bytes()[:1000])
    assert f"{UNET} cannot be read as safetensors" in refusal(folder)


def test_a_network_that_cannot_be_built_leaves_the_default_dtype_as_it_was(own_pipeline: Callable[..., Path]) -> None:
    folder = own_pipeline("sd15")
    change(folder / "unet/config.json", norm_num_groups=7)
    assert "the unet in" in refusal(folder, dtype="float16")
    assert torch.get_default_dtype() == torch.float32


def test_a_damaged_configuration_is_refused(own_pipeline: Callable[..., Path]) -> None:
    folder = own_pipeline("sd15")
    (folder / "vae/config.json").write_text("{")
    assert "vae/config.json cannot be read as JSON" in refusal(folder)


def test_a_text_encoder_of_another_width_is_refused_with_both_widths(own_pipeline: Callable[..., Path]) -> None:
    folder = own_pipeline("sd15")
    change(folder / "unet/config.json", cross_attention_dim=48)
    message = refusal(folder)
    assert "texts of width 48" in message
    assert "width 32" in message


def test_a_text_encoder_from_elsewhere_is_refused(own_pipeline: Callable[..., Path]) -> None:
    folder = own_pipeline("sd15")
    change(folder / "model_index.json", text_encoder=["somewhere", "Encoder"])
    assert "somewhere.Encoder" in refusal(folder)


def test_latents_with_other_channels_than_the_unet_takes_are_refused_with_both_numbers(
    own_pipeline: Callable[..., Path],
) -> None:
    folder = own_pipeline("sd15")
    change(folder / "vae/config.json", latent_channels=16)
    message = refusal(folder)
    assert "takes 4 channels" in message
    assert "makes 16" in message
    patches = own_pipeline("shapes")
    change(patches / "vae/config.json", patch_size=8)
    assert "makes 192" in refusal(patches)


def test_an_inpainting_unet_is_refused(own_pipeline: Callable[..., Path]) -> None:
    folder = own_pipeline("sd15")
    change(folder / "unet/config.json", in_channels=9)
    assert "takes 9 channels and returns 4" in refusal(folder)


def test_another_kind_of_autoencoder_is_refused_by_name(own_pipeline: Callable[..., Path]) -> None:
    folder = own_pipeline("sd15")
    change(folder / "vae/config.json", _class_name="VQModel")
    assert "VQModel" in refusal(folder)


def test_an_installation_without_the_embedded_prior_says_how_to_make_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(distvsd.networks.folder, "EMBEDDED_FOLDER", tmp_path / "nothing")
    message = refusal("shapes")
    assert "embedded prior is not in this installation" in message
    assert "distvsd prior build" in message


def test_the_name_shapes_stands_for_the_folder_inside_the_package(
    monkeypatch: pytest.MonkeyPatch, own_pipeline: Callable[..., Path]
) -> None:
    assert Path(distvsd.shapes.__file__).parent / "weights" == distvsd.networks.folder.EMBEDDED_FOLDER
    folder = own_pipeline("shapes")
    monkeypatch.setattr(distvsd.networks.folder, "EMBEDDED_FOLDER", folder)
    assert load_prior("shapes", ["a red cube"]).folder.path == folder
