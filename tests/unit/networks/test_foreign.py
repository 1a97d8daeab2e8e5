"""Untrusted folders: nothing in them is run, nothing outside them is opened, and every fault is an error message."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import distvsd.cli
from distvsd.errors import PriorError
from distvsd.looking import describe_prior
from distvsd.prior import load_prior

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
HANG_S = 60


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """Fails a test that hangs, as one that opens a FIFO would."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no answer after {HANG_S} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(HANG_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refusal(folder: Path) -> str:
    """The error message of `load_prior`. `describe` builds no network, so it may pass; its error has a message too."""
    try:
        describe_prior.describe(str(folder))
    except PriorError as error:
        assert str(error)
    with pytest.raises(PriorError) as caught:
        load_prior(str(folder), ["a red cube"])
    return str(caught.value)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


class Payload:
    """An object that writes the file `mark` when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.mark, "code was run")


@pytest.mark.guarantee("G32")
@pytest.mark.parametrize("file", [UNET, TEXT])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "weights.ckpt", "weights"])
def test_an_index_that_names_a_pickle_is_refused_and_nothing_is_unpickled(
    file: str, name: str, own_pipeline: Callable[..., Path], tmp_path: Path
) -> None:
    """A list of shards whose files are pickles runs no code."""
    folder, mark = own_pipeline("sd15"), tmp_path / "mark"
    whole = folder / file
    names = sorted(load_file(whole))
    whole.unlink()
    (whole.parent / name).write_bytes(pickle.dumps(Payload(mark)))
    Path(f"{whole}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))
    assert f"names '{name}' as a weight file" in refusal(folder)
    assert not mark.exists()


@pytest.mark.guarantee("G32")
@pytest.mark.parametrize("file", [UNET, TEXT])
def test_a_pickle_under_the_name_of_safetensors_is_refused(
    file: str, own_pipeline: Callable[..., Path], tmp_path: Path
) -> None:
    """The format of a weight file is judged by its content, not by its name."""
    folder, mark = own_pipeline("sd15"), tmp_path / "mark"
    (folder / file).write_bytes(pickle.dumps(Payload(mark)))
    assert f"{file} cannot be read as safetensors" in refusal(folder)
    torch.save({"a": Payload(mark)}, folder / file)
    assert f"{file} cannot be read as safetensors" in refusal(folder)
    assert not mark.exists()


@pytest.mark.parametrize(
    "place",
    ["../../../etc/passwd", "/etc/passwd", "..", "", "sub/x.safetensors", "../unet/x.safetensors", None, 3, ["a"]],
)
def test_a_weight_file_in_another_folder_is_not_opened(place: Any, own_pipeline: Callable[..., Path]) -> None:
    folder = own_pipeline("sd15")
    names = sorted(load_file(folder / UNET))
    (folder / UNET).rename(folder / "unet/x.safetensors")
    places = dict.fromkeys(names, "x.safetensors") | {names[3]: place}
    Path(f"{folder / UNET}.index.json").write_text(json.dumps({"weight_map": places}))
    assert "as a weight file; only .safetensors files in its own folder are read" in refusal(folder)


@pytest.mark.parametrize("weight_map", [None, {}, [], "x.safetensors", 3])
def test_an_index_without_files_is_refused(weight_map: Any, own_pipeline: Callable[..., Path]) -> None:
    folder = own_pipeline("sd15")
    (folder / UNET).unlink()
    Path(f"{folder / UNET}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "lists no weight files" in refusal(folder)


def test_an_index_that_names_a_tensor_no_shard_holds_is_refused(own_pipeline: Callable[..., Path]) -> None:
    """diffusers trusts the index and would leave that tensor at its random initial values."""
    folder = own_pipeline("sd15")
    weights = load_file(folder / UNET)
    (folder / UNET).unlink()
    places = dict.fromkeys(weights, "x.safetensors")
    del weights["conv_out.bias"]
    save_file(weights, folder / "unet/x.safetensors", {"format": "pt"})
    Path(f"{folder / UNET}.index.json").write_text(json.dumps({"weight_map": places}))
    assert "do not hold the same tensors: 'conv_out.bias'" in refusal(folder)


def test_a_cache_of_the_hub_with_links_to_its_blobs_is_a_prior(
    own_pipeline: Callable[..., Path], tmp_path: Path
) -> None:
    folder = own_pipeline("sd15")
    wanted = load_prior(str(folder), ["a red cube"])
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(file for file in folder.rglob("*") if file.is_file())):
        shutil.copyfile(file, blobs / f"{number:064x}")
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / f"{number:064x}", link.parent))
    found = load_prior(str(snapshot), ["a red cube"])
    assert found.identity() == wanted.identity()
    assert torch.equal(found.texts.negative(1).text, wanted.texts.negative(1).text)
    assert all(
        map(torch.equal, found.denoiser.module.state_dict().values(), wanted.denoiser.module.state_dict().values())
    )


def test_what_is_no_regular_file_is_refused_and_never_waited_for(own_pipeline: Callable[..., Path]) -> None:
    folder = own_pipeline("sd15")
    kept = folder.with_name("kept")
    for file in sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file()):
        (folder / file).rename(kept)
        makers: list[Callable[[Path], object]] = [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")]
        for make in makers:
            make(folder / file)
            if file.name not in ("special_tokens_map.json", "tokenizer_config.json"):  # a tokenizer loads without these
                assert str(folder) in refusal(folder)
            if (folder / file).is_dir():
                (folder / file).rmdir()
            else:
                (folder / file).unlink()
        kept.rename(folder / file)
    load_prior(str(folder), ["a red cube"])


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b"3", b"\xff\xfe{}", b"{", b'{"a": ' * 3000, b'{"a":' * 80 + b"1" + b"}" * 80]
)
def test_a_configuration_that_is_no_plain_json_object_is_refused_by_name(
    content: bytes, own_pipeline: Callable[..., Path]
) -> None:
    folder = own_pipeline("sd15")
    names = ("model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json")
    for name in (*names, "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        assert name in refusal(folder)
        (folder / name).write_bytes(before)
    load_prior(str(folder), ["a red cube"])


HUGE = 10**9
UNET_CONFIG, VAE_CONFIG = "unet/config.json", "vae/config.json"
TEXT_CONFIG, SCHEDULE = "text_encoder/config.json", "scheduler/scheduler_config.json"
WRONG: list[tuple[str, str, Any]] = [
    *((UNET_CONFIG, key, HUGE) for key in ("layers_per_block", "transformer_layers_per_block", "conv_in_kernel")),
    *((UNET_CONFIG, "block_out_channels", value) for value in ([HUGE, HUGE], None, 4, [], ["a", "b"], [16] * 3000)),
    *((UNET_CONFIG, "sample_size", value) for value in (HUGE, -1, "64", [8, None], float("nan"))),
    *((UNET_CONFIG, "in_channels", value) for value in ("4", None, True, 4.0, -4)),
    *((UNET_CONFIG, "cross_attention_dim", value) for value in ({}, "32", [32, 32, 32], -32, HUGE)),
    *((UNET_CONFIG, "down_block_types", value) for value in (None, ["NoBlock2D"] * 2, "DownBlock2D", [1, 2])),
    *((UNET_CONFIG, key, {"a": 1}) for key in ("act_fn", "norm_eps", "mid_block_type", "time_embedding_dim")),
    *((UNET_CONFIG, key, "x") for key in ("mid_block_scale_factor", "freq_shift", "norm_num_groups")),
    *((UNET_CONFIG, "_class_name", value) for value in ([], 3, "UNet2DModel")),
    *((VAE_CONFIG, "scaling_factor", value) for value in (0, None, "1", float("nan"), float("inf"), 10**40, -1)),
    *((VAE_CONFIG, key, HUGE) for key in ("latent_channels", "layers_per_block")),
    *((VAE_CONFIG, "block_out_channels", value) for value in (None, 8, [8] * 3000, [8, 8, 16])),
    *((VAE_CONFIG, "shift_factor", value) for value in ("0", [], float("inf"))),
    *((TEXT_CONFIG, "num_hidden_layers", value) for value in (HUGE, -1, "2", None)),
    *((TEXT_CONFIG, "hidden_size", value) for value in (10**7, 33, "32", None, [32])),
    *((TEXT_CONFIG, key, HUGE) for key in ("vocab_size", "max_position_embeddings", "intermediate_size")),
    *((TEXT_CONFIG, "hidden_act", value) for value in (None, "no_act", 3)),
    *((TEXT_CONFIG, "per_layer_config", value) for value in ({"0": {"hidden_size": 64}},)),
    *((SCHEDULE, "num_train_timesteps", value) for value in (HUGE, 0, -1, "1000", 1.5)),
    *((SCHEDULE, "trained_betas", value) for value in ("x", [], ["a"], [[0.1]], {}, [True])),
    *((SCHEDULE, key, value) for key in ("beta_start", "beta_schedule") for value in ("x", {}, [1])),
    *((SCHEDULE, "beta_end", value) for value in (float("nan"), 1e308, -5)),
    *((SCHEDULE, "_class_name", value) for value in (None, [], "os", "utils", "SchedulerMixin")),
    *(("model_index.json", "text_encoder", value) for value in (None, "CLIPTextModel", ["transformers"], [None, None])),
    *(("model_index.json", "text_encoder", ["transformers", name]) for name in ("os", "GPT2Model", "CLIPVisionModel")),
    *(("model_index.json", "_class_name", value) for value in (3, ["a"])),
]


@pytest.mark.parametrize(("file", "key", "value"), WRONG)
def test_a_value_of_a_wrong_type_or_size_is_refused_before_memory_is_taken_for_it(
    file: str, key: str, value: Any, shared_pipeline: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "prior"
    shutil.copytree(shared_pipeline("sd15"), folder)
    change(folder / file, **{key: value})
    message = refusal(folder)
    assert str(folder) in message and len(message) < 1500


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
@pytest.mark.parametrize("file", [UNET, TEXT])
def test_weights_of_a_kind_that_nothing_here_computes_with_are_refused(
    dtype: torch.dtype, file: str, own_pipeline: Callable[..., Path]
) -> None:
    folder = own_pipeline("sd15")
    weights = load_file(folder / file)
    name = next(key for key in sorted(weights) if weights[key].is_floating_point())
    weights[name] = weights[name].to(dtype)
    save_file(weights, folder / file, {"format": "pt"})
    assert name in (message := refusal(folder)) and "not supported" in message


@pytest.mark.parametrize("value", [0, 65, None, "4", 4.5, HUGE, [4]])
def test_a_patch_codec_of_a_wrong_size_is_refused(value: Any, own_pipeline: Callable[..., Path]) -> None:
    folder = own_pipeline("shapes")
    change(folder / VAE_CONFIG, patch_size=value)
    assert "patch_size" in refusal(folder)


@pytest.mark.parametrize("file", [UNET_CONFIG, VAE_CONFIG, TEXT_CONFIG, SCHEDULE])
def test_a_quantised_pipeline_is_refused_by_the_name_of_the_setting(
    file: str, own_pipeline: Callable[..., Path]
) -> None:
    folder = own_pipeline("sd15")
    change(folder / file, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert "quantization_config, which is not supported" in refusal(folder)


def test_settings_that_name_other_code_or_storage_change_nothing(own_pipeline: Callable[..., Path]) -> None:
    folder = own_pipeline("sd15")
    wanted = load_prior(str(folder), ["a red cube"]).texts.negative(1).text
    settings = {"transformers_weights": "other.bin", "torch_dtype": "float16", "attn_implementation": "a/kernel"}
    change(folder / TEXT_CONFIG, _attn_implementation="a/kernel", configuration_files=["config.9.json"], **settings)
    assert torch.equal(load_prior(str(folder), ["a red cube"]).texts.negative(1).text, wanted)


def test_a_tokenizer_without_a_token_to_pad_with_is_refused(own_pipeline: Callable[..., Path]) -> None:
    folder = own_pipeline("shapes")
    file = folder / "tokenizer/tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["pad_token"]
    file.write_text(json.dumps(settings))
    assert "no token to pad with" in refusal(folder)


def test_a_token_that_the_text_encoder_does_not_know_is_refused_with_both_numbers(
    own_pipeline: Callable[..., Path],
) -> None:
    folder = own_pipeline("sd15")
    words = json.loads((folder / "tokenizer/vocab.json").read_text())
    size, highest = len(words), max(words.values())
    words["red</w>"] = highest + 7
    (folder / "tokenizer/vocab.json").write_text(json.dumps(words))
    message = refusal(folder)
    assert f"the number {highest + 7}" in message and f"knows {size} tokens" in message


@pytest.mark.parametrize("length", [0, -5, "x", HUGE, None])
def test_a_length_of_texts_that_no_encoder_has_is_refused(length: Any, own_pipeline: Callable[..., Path]) -> None:
    folder = own_pipeline("sd15")
    change(folder / "tokenizer/tokenizer_config.json", model_max_length=length)
    if length in (HUGE, None):  # the encoder's own length is used
        assert load_prior(str(folder), ["a red cube"]).texts.negative(1).text.shape[1] == 77
    else:
        assert "token" in refusal(folder)


def test_a_path_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    for path in ("", "a" * 5000, "a\0b", "~nobody-of-this-name/prior", str(tmp_path / "a" / ".." / "b"), "\ud800"):
        with pytest.raises(PriorError):
            load_prior(path, ["a red cube"])


@pytest.mark.parametrize(
    "arguments",
    [["prior", "info", "{prior}"], ["prior", "sample", "a cube", "--path", "{prior}", "--out", "{prior}.png"]],
)
@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_prior_that_is_not_there_or_does_not_fit_is_wrong_usage(
    arguments: list[str],
    is_damaged: bool,
    own_pipeline: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2 tells a job queue not to try again."""
    folder = own_pipeline("sd15") if is_damaged else tmp_path / "nowhere"
    if is_damaged:
        (folder / UNET).write_bytes(b"x")
    assert distvsd.cli.main([argument.format(prior=folder) for argument in arguments]) == 2
    assert str(folder) in capsys.readouterr().err
