"""The saved score network resumes bit for bit, and peft can load its adapter alone."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from distvsd.errors import CheckpointError

from .conftest import OneRank, training


def train(score, batch, steps: int) -> None:
    for _ in range(steps):
        (gradient,), _ = score.gradients(*batch.arguments(), 3.0, [slice(0, 3)])
        score.step(gradient, 1e-2)


def write(trained, folder) -> None:
    (folder / "score").mkdir()
    for file, tensors in trained.state().items():
        save_file(tensors, folder / file)
    for file, text in trained.score.texts().items():
        (folder / file).write_text(text)


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(
        one[f].keys() == other[f].keys() and all(torch.equal(one[f][n], other[f][n]) for n in one[f]) for f in one
    )


def test_a_restored_score_network_goes_on_bit_for_bit(unet, make_score, make_batch, tmp_path):
    batch = make_batch(3)
    score = make_score(unet, warmup=5)
    train(score, batch, 3)
    saved = training(score, OneRank())
    saved.replay.push(batch.samples, 0)
    saved.left_out = 2
    write(saved, tmp_path)
    files = {f"score/{path.name}": load_file(path) for path in (tmp_path / "score").glob("*.safetensors")}
    other = make_score(unet, seed=99, warmup=5)
    restored = training(other, OneRank())
    restored.load_state(files)
    assert equal(restored.state(), saved.state()) and restored.left_out == 2
    train(score, batch, 3)
    train(other, batch, 3)
    assert other.local.num_steps == 6
    assert equal(restored.state(), saved.state())


def test_state_before_the_first_step_restores_too(unet, make_score, make_batch):
    batch = make_batch(3)
    fresh, trained = make_score(unet), make_score(unet, seed=99)
    train(trained, batch, 2)
    trained.load_state(fresh.state())
    train(trained, batch, 1)
    train(fresh, batch, 1)
    assert equal(trained.state(), fresh.state())


def test_state_is_a_copy_that_training_does_not_change(unet, make_score, make_batch):
    score = make_score(unet)
    train(score, make_batch(3), 1)
    state = score.state()
    copies = {file: {name: t.clone() for name, t in tensors.items()} for file, tensors in state.items()}
    train(score, make_batch(3), 1)
    assert equal(state, copies)


def test_peft_alone_loads_the_folder(unet, make_unet, make_score, make_batch, tmp_path):
    from peft import PeftModel, get_peft_model_state_dict

    score = make_score(unet)
    train(score, make_batch(3), 2)
    write(training(score, OneRank()), tmp_path)
    loaded = PeftModel.from_pretrained(make_unet(), str(tmp_path / "score"))
    adapter = get_peft_model_state_dict(loaded)
    ours = {name: p for name, p in score.trainable.items() if not name.startswith("camera.")}
    assert adapter.keys() == ours.keys()
    assert all(torch.equal(adapter[name], ours[name]) for name in ours)
    assert any(ours[name].any() for name in ours if "lora_B" in name)


def test_the_adapter_files_are_those_peft_itself_would_write(unet, make_unet, make_score, make_batch, tmp_path):
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    score = make_score(unet, rank=3)
    train(score, make_batch(3), 1)
    write(training(score, OneRank()), tmp_path)
    settings = LoraConfig(r=3, lora_alpha=3, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    theirs = get_peft_model(make_unet(), settings)
    set_peft_model_state_dict(theirs, load_file(tmp_path / "score" / "adapter_model.safetensors"))
    theirs.save_pretrained(str(tmp_path / "peft"))
    written = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert equal({"adapter": written}, {"adapter": load_file(tmp_path / "score" / "adapter_model.safetensors")})
    configs = [json.loads((tmp_path / folder / "adapter_config.json").read_text()) for folder in ("score", "peft")]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])
    assert configs[0] == configs[1]


def test_a_checkpoint_from_before_steps_left_out_were_counted_is_read(unet, make_score, make_batch):
    score = make_score(unet)
    train(score, make_batch(3), 1)
    saved = training(score, OneRank())
    old = saved.state()
    del old["score/optimizer.safetensors"]["left_out"]
    restored = training(make_score(unet, seed=99), OneRank())
    restored.load_state(old)
    assert equal(restored.state(), saved.state()) and restored.left_out == 0


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("score/camera.safetensors", "last.bias"),
        ("score/optimizer.safetensors", "num_steps"),
        ("score/optimizer.safetensors", "camera.last.bias.exp_avg"),
        ("score/replay.safetensors", "rounds"),
    ],
)
def test_a_missing_tensor_is_named_and_nothing_is_loaded(unet, make_score, make_batch, file, name):
    score = make_score(unet)
    train(score, make_batch(3), 1)
    torn = training(score, OneRank()).state()
    del torn[file][name]
    other = training(make_score(unet, seed=99), OneRank())
    before = other.state()
    with pytest.raises(CheckpointError, match=name.rsplit(".", 1)[-1]):
        other.load_state(torn)
    assert equal(other.state(), before)


def test_another_rank_is_refused_with_both_shapes(unet, make_score):
    with pytest.raises(CheckpointError, match=r"score\.rank"):
        make_score(unet, rank=3).load_state(make_score(unet, rank=2).state())
