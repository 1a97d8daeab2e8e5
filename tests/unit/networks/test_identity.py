"""The identity of a prior covers exactly what is loaded, whatever lies beside it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from distvsd.errors import PriorError
from distvsd.networks.folder import open_folder
from distvsd.networks.identity import Identity
from distvsd.prior import Pipeline, load_prior

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
# The embedded prior's identity by the rule before `v2:`, as older checkpoints have it.
EMBEDDED_BEFORE = "464c8935029e2f9b48823b6b854c39ce08a44f87a68311456cb4002cff481c82"


def identity(folder: Path) -> str:
    return Identity(open_folder(str(folder))).current()


def loaded(folder: Path) -> list[torch.Tensor]:
    """Everything a run takes from the prior: texts, both networks, the schedule."""
    prior = load_prior(str(folder), ["a red cube"])
    codec = prior.codec.state_dict().values() if isinstance(prior.codec, torch.nn.Module) else ()
    return [
        prior.texts.bare(torch.tensor([0])).text,
        prior.process.alphas_cumprod,
        *prior.denoiser.module.state_dict().values(),
        *codec,
    ]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def cut_up(folder: Path, stem: str) -> list[Path]:
    """Writes a component's weights again as two shards and their index, beside the whole file."""
    weights = load_file(folder / f"{stem}.safetensors")
    names = sorted(weights)
    parts = {f"{stem}-0000{1 + i}-of-00002.safetensors": names[i::2] for i in range(2)}
    for part, of in parts.items():
        save_file({name: weights[name] for name in of}, folder / part, {"format": "pt"})
    places = {name: part for part, of in parts.items() for name in of}
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return [folder / part for part in parts]


def nudge(file: Path) -> None:
    weights = load_file(file)
    name = next(key for key in sorted(weights) if weights[key].is_floating_point())
    weights[name] += 1e-3
    save_file(weights, file, {"format": "pt"})


def changed_values(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for key, value in config.items():
        if not key.startswith("_") and key != "transformers_version":
            yield config | {key: [value]}


@pytest.mark.parametrize("layout", ["sd15", "shapes"])
def test_every_file_and_every_setting_of_a_pipeline_counts(layout: str, own_pipeline: Callable[..., Path]) -> None:
    folder = own_pipeline(layout)
    before = identity(folder)
    counted = 0
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or file.name == "model_index.json":
            continue
        content = file.read_bytes()
        if file.suffix == ".safetensors":
            nudge(file)
            versions = [file.read_bytes()]
        elif "config.json" in file.name and file.parent.name != "tokenizer":
            versions = [json.dumps(config).encode() for config in changed_values(json.loads(content))]
        else:
            versions = [content + b" "]
        for version in versions:
            file.write_bytes(version)
            try:
                after = identity(folder)
            except PriorError:  # a refusal counts as noticed
                after = ""
            assert after != before, f"{file}: {version[:200]!r}"
            counted += 1
        file.write_bytes(content)
    assert identity(folder) == before and counted > 60


def test_the_class_of_the_text_encoder_counts_and_who_wrote_a_file_does_not(own_pipeline: Callable[..., Path]) -> None:
    folder = own_pipeline("sd15")
    before = identity(folder)
    for file in ("unet/config.json", "model_index.json", "scheduler/scheduler_config.json"):
        content = json.loads((folder / file).read_text()) | {"_diffusers_version": "9.9", "_name_or_path": "/elsewhere"}
        (folder / file).write_text(json.dumps(content))
    assert identity(folder) == before
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "CLIPTextModelWithProjection"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert identity(folder) != before


@pytest.mark.parametrize("component", STEMS)
def test_weights_both_whole_and_in_shards_are_refused_by_name(
    component: str, own_pipeline: Callable[..., Path]
) -> None:
    """diffusers would take the shards and transformers the whole file."""
    folder = own_pipeline("sd15")
    stem = STEMS[component]
    cut_up(folder / component, stem)
    with pytest.raises(PriorError, match=rf"twice.*{stem}\.safetensors.*{stem}\.safetensors\.index\.json"):
        load_prior(str(folder), ["a red cube"])
    with pytest.raises(PriorError, match="twice"):
        identity(folder)


def test_shards_load_as_the_whole_file_does_and_each_of_them_counts(own_pipeline: Callable[..., Path]) -> None:
    folder = own_pipeline("sd15")
    whole = loaded(folder)
    shards = []
    for component, stem in STEMS.items():
        shards += cut_up(folder / component, stem)
        (folder / component / f"{stem}.safetensors").unlink()
    assert same(loaded(folder), whole)
    identities = [identity(folder)]
    for shard in shards:
        nudge(shard)
        identities.append(identity(folder))
    assert len(set(identities)) == 1 + 6
    assert not same(loaded(folder), whole)


def test_shards_of_the_fp16_variant_load(own_pipeline: Callable[..., Path]) -> None:
    folder = own_pipeline("sd15")
    part = folder / "unet"
    file = part / "diffusion_pytorch_model.safetensors"
    save_file({name: value.half() for name, value in load_file(file).items()}, file, {"format": "pt"})
    whole = loaded(folder)
    cut_up(part, "diffusion_pytorch_model")
    file.unlink()
    (part / f"{file.name}.index.json").rename(part / f"{file.name}.index.fp16.json")
    assert same(loaded(folder), whole)


@pytest.mark.parametrize("component", STEMS)
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_beside_the_weights_is_refused_by_name(
    component: str, name: str, own_pipeline: Callable[..., Path]
) -> None:
    folder = own_pipeline("sd15")
    (folder / component / name).write_text("{}")
    with pytest.raises(PriorError, match=f"{component} holds an adapter.*{name}"):
        load_prior(str(folder), ["a red cube"])


def test_a_real_adapter_is_refused_and_not_applied(own_pipeline: Callable[..., Path]) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPTextModel

    folder = own_pipeline("sd15")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(encoder, lora).save_pretrained(folder / "text_encoder")
    with pytest.raises(PriorError, match="adapter"):
        load_prior(str(folder), ["a red cube"])


def test_what_lies_beside_the_files_that_are_loaded_changes_neither_them_nor_the_identity(
    own_pipeline: Callable[..., Path],
) -> None:
    """The libraries would open or prefer files of these names; here they contain rubbish."""
    folder = own_pipeline("sd15")
    whole, before = loaded(folder), identity(folder)
    for component, stem in STEMS.items():
        for name in (
            f"{stem}.fp16.safetensors",
            f"{stem}.non_ema.safetensors",
            f"{stem}.bin",
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
            "model.ckpt",
            "generation_config.json",
            "processor_config.json",
            "custom_generate.py",
            "tf_model.h5",
        ):
            (folder / component / name).write_bytes(b"rubbish")
    (folder / "tokenizer" / "additional_chat_templates").mkdir()
    (folder / "tokenizer" / "additional_chat_templates" / "a.jinja").write_bytes(b"\xff")
    (folder / "tokenizer" / ".hidden.json").write_bytes(b"\xff")
    assert same(loaded(folder), whole)
    assert identity(folder) == before


def test_a_tokenizer_reads_no_file_that_its_settings_name(own_pipeline: Callable[..., Path], tmp_path: Path) -> None:
    folder = own_pipeline("sd15")
    whole = loaded(folder)
    words = json.loads((folder / "tokenizer/vocab.json").read_text())
    other = dict(zip(words, reversed(words.values()), strict=True))
    (tmp_path / "vocab.json").write_text(json.dumps(other))
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings = json.loads((folder / "tokenizer" / name).read_text())
        (folder / "tokenizer" / name).write_text(json.dumps(settings | {"vocab_file": str(tmp_path / "vocab.json")}))
    assert same(loaded(folder), whole)


def test_the_files_are_hashed_once_however_often_the_identity_is_asked_for(own_pipeline: Callable[..., Path]) -> None:
    folder = own_pipeline("sd15")
    prior = load_prior(str(folder), ["a red cube"])
    first = prior.identity()
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    assert prior.identity() == first
    assert not prior.is_identified_by("0" * 64)


def identity_before_versions(folder: Path) -> str:
    """The rule of older checkpoints, whose identity is 64 hex digits, implemented again."""
    digest = hashlib.sha256()
    files = {"scheduler": "scheduler_config.json", "text_encoder": "config.json", "unet": "config.json"}
    for component, name in sorted((files | {"vae": "config.json"}).items()):
        config = json.loads((folder / component / name).read_text())
        for key in [key for key in config if key.startswith("_") and key != "_class_name"]:
            del config[key]
        config.pop("transformers_version", None)
        digest.update(f"{component} {json.dumps(config, sort_keys=True)}\n".encode())
        for file in sorted((folder / component).glob("*.safetensors")):
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    for file in sorted((folder / "tokenizer").iterdir()):
        digest.update(f"tokenizer/{file.name}\n".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def test_an_identity_of_the_older_rule_is_recognised_where_it_fits(
    own_pipeline: Callable[..., Path], tmp_path: Path
) -> None:
    def fits(folder: Path | str, stored: str) -> bool:
        return load_prior(str(folder), ["a red cube"]).is_identified_by(stored)

    assert fits("shapes", EMBEDDED_BEFORE)
    folder = own_pipeline("sd15")
    cut_up(folder / "unet", STEMS["unet"])
    (folder / "unet" / f"{STEMS['unet']}.safetensors").unlink()
    before = identity_before_versions(folder)
    assert fits(folder, before) and fits(folder, identity(folder))
    assert not fits(folder, EMBEDDED_BEFORE) and not fits(folder, f"v1:{before}")
    copy = shutil.copytree(folder, tmp_path / "copy")
    nudge(copy / "vae" / f"{STEMS['vae']}.safetensors")
    assert not fits(copy, before)


def test_a_prior_object_answers_for_its_own_identity(shared_prior: Callable[..., Pipeline]) -> None:
    prior = shared_prior("sd15")
    assert prior.is_identified_by(prior.identity())
    assert not prior.is_identified_by("") and not prior.is_identified_by(prior.identity()[3:])
