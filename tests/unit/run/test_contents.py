"""A resume reads what `distvsd verify` calls sound, whoever signed it; both refuse what no resume can read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distvsd.checkpoint import open_checkpoint
from distvsd.config import Config, load_config
from distvsd.errors import CheckpointError
from distvsd.looking.opened import load_particles
from distvsd.run.build import Run, build_run
from distvsd.run.contents import Contents, verify
from distvsd.run.parts import make_objective
from distvsd.run.train import train
from distvsd.testing.pipelines import tiny_pipeline
from tests.signing import ALONE, change_tensors, resume, signed
from tests.small_run import SMOKE, refusals, small_config

PARTICLE = "particles/000001.safetensors"
OPTIMIZER, REPLAY = "score/optimizer.safetensors", "score/replay.safetensors"
ADAPTER, CAMERA = "score/adapter_model.safetensors", "score/camera.safetensors"
Change = Callable[[dict[str, Any], Path], object]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, prior: Path) -> tuple[Config, Run]:
    """A finished run of two rounds, and a newly built run into which it can be restored."""
    config = small_config(tmp_path_factory.mktemp("finished") / "run", prior, **{"schedule.rounds": 2})
    train(config)
    return config, build_run(config, ALONE, lambda done: False)


def altered(config: Config, folder: Path, *changes: Change) -> Path:
    """A copy of the run whose checkpoint was changed and signed again."""
    run = folder / "run"
    shutil.copytree(config.run.dir, run)
    checkpoint = run / "checkpoints" / "step-00000002"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for change in changes:
        change(manifest, checkpoint)
    (checkpoint / "manifest.json").write_bytes(signed(manifest))
    return run


def tensors(file: str, change: Callable[[dict[str, Tensor]], object]) -> Change:
    return lambda manifest, checkpoint: change_tensors(manifest, checkpoint, file, change)


def filled(file: str, ending: str, value: float) -> Change:
    """Sets every number of the first tensor whose name ends in `ending`."""
    return tensors(file, lambda found: found[first(found, ending)].fill_(value))


def cast(file: str, ending: str, dtype: torch.dtype) -> Change:
    def change(found: dict[str, Tensor]) -> None:
        found[first(found, ending)] = found[first(found, ending)].to(dtype)

    return tensors(file, change)


def cut(file: str, ending: str) -> Change:
    def change(found: dict[str, Tensor]) -> None:
        found[first(found, ending)] = found[first(found, ending)][:-1].clone()

    return tensors(file, change)


def first(found: dict[str, Tensor], ending: str) -> str:
    return next(name for name in sorted(found) if name.endswith(ending))


def health(**record: Any) -> Change:
    return lambda manifest, checkpoint: manifest["particles"][1]["health"].update(record)


def manifest_key(**keys: Any) -> Change:
    return lambda manifest, checkpoint: manifest.update(keys)


def one_more_particle(manifest: dict[str, Any], checkpoint: Path) -> None:
    file = "particles/000003.safetensors"
    shutil.copy(checkpoint / PARTICLE, checkpoint / file)
    manifest["files"][file], manifest["components"]["particle/000003"] = manifest["files"][PARTICLE], "0" * 64
    manifest["particles"].append({"id": 3, "file": file, "health": {}})


def without(file: str, component: str) -> Change:
    def change(manifest: dict[str, Any], checkpoint: Path) -> None:
        (checkpoint / file).unlink()
        del manifest["files"][file], manifest["components"][component]

    return change


HOLES = {
    "health_bytes is a text": (manifest_key(health_bytes="7"), "health_bytes"),
    "metrics_bytes is beyond every file": (manifest_key(metrics_bytes=2**63), "metrics_bytes"),
    "a count of rounds is a list": (health(bad=[1]), r"bad = a list"),
    "more rounds skipped than there were": (health(total=3), r"total = 3 .*0 to 2"),
    "quarantined is a number": (health(quarantined=1), "quarantined = 1 .*true or false"),
    "a good state that is nowhere": (health(good="beside"), "000001.*good/param/.* is missing"),
    "a particle more": (one_more_particle, "4 particles, but particles.count is 3"),
    "a parameter in another dtype": (cast(PARTICLE, "param/decoder_bias", torch.float64), "float64.*float32"),
    "a moment cut short": (cut(PARTICLE, "adam_m/decoder_bias"), r"000001.*adam_m/decoder_bias.*\[3\].*\[4\]"),
    "a negative second moment": (filled(PARTICLE, "adam_v/grid0", -1), "adam_v/grid0.*-1.0.*at least 0"),
    "a first moment that is not finite": (filled(PARTICLE, "adam_m/grid0", float("nan")), "adam_m/grid0.*finite"),
    "a negative step of a particle": (filled(PARTICLE, "adam_step", -5), "adam_step.*-5.*from 0 to 2"),
    "more steps than rounds": (filled(PARTICLE, "adam_step", 3), "adam_step.*3.*from 0 to 2"),
    "a negative number of steps": (filled(OPTIMIZER, "num_steps", -3), "optimizer.*num_steps.*-3"),
    "a step that is not the number of steps": (filled(OPTIMIZER, ".step", 7), r"\.step .*7.*from 2 to 2"),
    "two numbers of steps": (tensors(OPTIMIZER, lambda t: t.update(num_steps=torch.tensor([1, 2]))), "num_steps"),
    "a negative second moment of the adapter": (filled(OPTIMIZER, "exp_avg_sq", -1), "exp_avg_sq.*at least 0"),
    "a moment of integers": (cast(OPTIMIZER, "exp_avg_sq", torch.int64), "exp_avg_sq.*int64.*float32"),
    "an adapter of another width": (cut(ADAPTER, "lora_B.weight"), r"adapter_model.*lora_B.weight .*must be"),
    "an adapter that is not finite": (filled(ADAPTER, "lora_A.weight", float("inf")), "lora_A.weight.*finite"),
    "no camera embedding": (without(CAMERA, "score/camera"), "holds no score/camera"),
    "counts of floats": (cast(REPLAY, "counts", torch.float32), "counts is float32"),
    "counts of other rows": (tensors(REPLAY, lambda t: t["counts"].add_(1)), r"replay.*\[6, .*\[8, "),
    "counts whose sum wraps": (filled(REPLAY, "counts", 2**63 - 1), "counts.*9223372036854775807"),
    "a round twice": (filled(REPLAY, "rounds", 1), "rounds does not increase"),
    "a round that is still to come": (tensors(REPLAY, lambda t: t["rounds"].add_(1)), "rounds.*from 0 to 1"),
    "ids of nobody": (tensors(REPLAY, lambda t: t["ids"].add_(9)), "ids.*from 0 to 2"),
    "a negative weight": (filled(REPLAY, "weight", -1), "weight.*at least 0"),
    "a column cut short": (cut(REPLAY, "weight"), r"weight is float32 \[5\].*\[6\]"),
    "a latent that is not finite": (filled(REPLAY, "latents", float("nan")), "latents.*finite"),
}


@pytest.mark.parametrize("hole", HOLES)
def test_what_no_resume_can_read_is_refused_by_verify_and_by_a_resume_that_changes_nothing(
    finished: tuple[Config, Run], tmp_path: Path, hole: str
) -> None:
    config, parts = finished
    change, words = HOLES[hole]
    run = altered(config, tmp_path, change)
    with pytest.raises(CheckpointError, match=words) as by_verify:
        verify(run)
    with pytest.raises(CheckpointError, match=words) as by_resume:
        resume(config, parts, run)
    assert all("checkpoint" in str(refusal.value) for refusal in (by_verify, by_resume))


LEGITIMATE = {
    "as it was saved": [],
    "what later versions may add": [
        manifest_key(a_key_of_later=[1, None]),
        health(a_key_of_later={}),
        tensors(PARTICLE, lambda t: t.update(occupancy=torch.ones(3, dtype=torch.bool))),
    ],
    "what earlier versions did not have": [
        lambda manifest, checkpoint: manifest.pop("health_bytes"),
        lambda manifest, checkpoint: manifest["particles"][1].update(health={}),
        tensors(OPTIMIZER, lambda t: t.pop("left_out")),
        lambda manifest, checkpoint: manifest["config"]["particles"].pop("health"),
    ],
    "a particle that diverged": [filled(PARTICLE, "param/grid0", float("nan")), health(bad=2, total=2)],
    "a second moment that overflowed": [filled(OPTIMIZER, "exp_avg_sq", float("inf"))],
    "more steps than float32 counts": [
        filled(OPTIMIZER, "num_steps", 2**24 + 5),
        tensors(OPTIMIZER, lambda t: [value.fill_(2**24) for name, value in t.items() if name.endswith(".step")]),
    ],
    "renders of another resolution": [
        tensors(REPLAY, lambda t: t.update(latents=t["latents"][..., :2].clone())),
    ],
}


@pytest.mark.parametrize("case", LEGITIMATE)
def test_what_a_run_may_have_saved_is_sound_and_is_resumed(
    finished: tuple[Config, Run], tmp_path: Path, case: str
) -> None:
    config, parts = finished
    run = altered(config, tmp_path, *LEGITIMATE[case])
    assert "step-00000002 sound: 3 particles" in verify(run)[0]
    resume(config, parts, run)


def test_every_rank_refuses_in_the_same_words_and_the_files_of_the_run_stay(
    finished: tuple[Config, Run], tmp_path: Path
) -> None:
    config, _ = finished
    run = altered(config, tmp_path, filled(OPTIMIZER, "num_steps", -3))
    logged = (run / "metrics.jsonl").read_bytes()
    resumed = small_config(run, Path(config.prior.path), **{"schedule.rounds": 2})
    said = refusals(resumed, 2)
    assert said[0] == said[1] and said[0].startswith("CheckpointError: ") and "num_steps" in said[0]
    assert (run / "metrics.jsonl").read_bytes() == logged


def test_looking_at_a_run_refuses_particles_that_it_does_not_have(finished: tuple[Config, Run], tmp_path: Path) -> None:
    run = altered(finished[0], tmp_path, one_more_particle)
    with pytest.raises(CheckpointError, match=r"particles\.count is 3"):
        load_particles(run, "cpu")


def test_a_configuration_in_the_manifest_that_no_run_can_have_is_a_problem(
    finished: tuple[Config, Run], tmp_path: Path
) -> None:
    config, _ = finished
    run = altered(config, tmp_path, lambda manifest, checkpoint: manifest["config"]["particles"].update(count="three"))
    with pytest.raises(CheckpointError, match=r"manifest.json: particles.count is the text 'three'"):
        verify(run)


def away(run: Path, prior: Path) -> None:
    """Makes the run's configuration name a prior that does not exist."""
    path = run / "config.yaml"
    path.write_text(path.read_text().replace(str(prior), str(prior / "nowhere")))


@pytest.mark.parametrize("is_there", [True, False])
def test_without_its_prior_a_checkpoint_is_held_against_itself_and_what_was_left_out_is_said(
    finished: tuple[Config, Run], tmp_path: Path, prior: Path, caplog: pytest.LogCaptureFixture, is_there: bool
) -> None:
    """The prior is missing, or another one is in its place."""
    config, _ = finished
    run = altered(config, tmp_path)
    if is_there:
        other = tiny_pipeline(tmp_path / "other", "sd15")
        path = run / "config.yaml"
        path.write_text(path.read_text().replace(str(prior), str(other)))
    else:
        away(run, prior)
    assert "sound" in verify(run)[0]
    assert "could not be held against the prior" in caplog.text
    assert ("another prior" in caplog.text) == is_there


@pytest.mark.parametrize("hole", ["a negative step of a particle", "a moment of integers", "ids of nobody"])
def test_without_its_prior_holes_are_found_all_the_same(
    finished: tuple[Config, Run], tmp_path: Path, prior: Path, hole: str
) -> None:
    change, words = HOLES[hole]
    run = altered(finished[0], tmp_path, change)
    away(run, prior)
    with pytest.raises(CheckpointError, match=words):
        verify(run)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (tensors(ADAPTER, lambda t: t.pop(first(t, "lora_A.weight"))), "lora_A.weight is missing"),
        (cut(ADAPTER, "lora_A.weight"), r"lora_A.weight is float32 \[7, .*must be float32 \[8, "),
        (cut(CAMERA, "last.weight"), r"camera.*last.weight"),
        (cut(OPTIMIZER, "lora_B.weight.exp_avg"), "optimizer.*lora_B.weight.exp_avg"),
    ],
)
def test_without_its_prior_the_files_of_the_score_network_must_fit_each_other_and_the_rank(
    finished: tuple[Config, Run], tmp_path: Path, prior: Path, change: Change, words: str
) -> None:
    run = altered(finished[0], tmp_path, change)
    away(run, prior)
    with pytest.raises(CheckpointError, match=words):
        verify(run)


def test_a_network_that_reads_no_cameras_resumes_from_a_checkpoint_that_holds_a_camera_embedding(
    finished: tuple[Config, Run],
) -> None:
    config, parts = finished
    checkpoint = open_checkpoint(Path(config.run.dir) / "checkpoints", 2)
    shapes = {name: tuple(parameter.shape) for name, parameter in parts.training.score.trainable.items()}
    adapter = {name: shape for name, shape in shapes.items() if not name.startswith("camera.")}
    assert len(adapter) < len(shapes)
    assert checkpoint.problems(Contents(config, adapter, parts.prior.folder)) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"particles.image.space": "pixel", "objective.kind": "sds"},
        {"particles.image.space": "latent", "particles.image.init_color": 0.3},
    ],
)
def test_images_are_sound_with_and_without_their_prior_and_another_size_is_found(
    tmp_path: Path, prior: Path, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(tmp_path / "images", prior, **{"schedule.rounds": 2, "particles.kind": "image", **changes})
    train(config)
    assert "sound" in verify(Path(config.run.dir))[0] and not caplog.text
    run = altered(config, tmp_path, cut(PARTICLE, "image"))
    with pytest.raises(CheckpointError, match=r"000001.*/image is"):
        verify(run)
    away(Path(config.run.dir), prior)
    assert "sound" in verify(Path(config.run.dir))[0] and "held against the prior" in caplog.text


@pytest.mark.parametrize("kind", ["vsd", "sds", "esd"])
def test_the_configuration_knows_which_objectives_train_a_score_network(kind: str) -> None:
    config = load_config(SMOKE, [f"objective.kind={kind}"]).objective
    assert config.needs_score == bool(
        make_objective(Config(objective=config)).needs & {"score", "score_without_camera"}
    )


def test_a_run_without_a_score_network_is_sound_with_and_without_its_prior(prior: Path, tmp_path: Path) -> None:
    here = tmp_path / "prior"
    shutil.copytree(prior, here)
    config = small_config(tmp_path / "run", here, **{"objective.kind": "sds", "schedule.rounds": 1})
    assert train(config) == 0
    assert "sound" in verify(tmp_path / "run")[0]
    shutil.rmtree(here)
    assert "sound" in verify(tmp_path / "run")[0]
