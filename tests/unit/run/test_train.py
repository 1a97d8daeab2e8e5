"""Whole runs in this process, on a prior that was never trained: what a run writes, refuses, survives and continues."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import distvsd.run.pictures as pictures_module
import distvsd.run.trainer as trainer_module
from distvsd.config import Config, load_config
from distvsd.errors import CheckpointError, ConfigError, PriorError, RunError
from distvsd.faults import injected
from distvsd.looking.opened import load_particles
from distvsd.networks.identity import Identity
from distvsd.parallel.world import World
from distvsd.prior.guidance import GUIDED, ClassifierFree
from distvsd.run.build import Run, build_run
from distvsd.run.contents import verify as verify_run
from distvsd.run.train import train
from distvsd.testing.pipelines import tiny_pipeline
from tests.small_run import TINY

SMOKE = Path(__file__).parents[3] / "configs" / "smoke.yaml"
ALONE = World(0, 1, 0, 1, torch.device("cpu"))
SMALL = {
    "particles.count": 2,
    **TINY,
    "schedule.rounds": 2,
    "checkpoint.every": 0,
    "score.rank": 2,
}
METRICS = {
    "round", "time_s", "updates_per_s", "score_loss", "score_steps_skipped", "lag", "healthy", "resolution", "t_max",
    "phase_s", "quarantined", "exchanged_bytes", "save_stall_s", "save_failures", "imbalance",
}  # fmt: skip
# The embedded prior's identity in checkpoints from before the rule had versions.
EMBEDDED_BEFORE = "464c8935029e2f9b48823b6b854c39ce08a44f87a68311456cb4002cff481c82"
PHASES = {"render", "encode", "exchange", "objective", "update"}


@pytest.fixture(scope="module")
def priors(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny pipeline of each prediction type, made once."""
    made: dict[str, Path] = {}

    def prior(prediction: str = "v_prediction") -> Path:
        if prediction not in made:
            made[prediction] = tiny_pipeline(tmp_path_factory.mktemp(prediction), "shapes", prediction)  # type: ignore[arg-type]
        return made[prediction]

    return prior


@pytest.fixture
def configured(tmp_path: Path, priors: Callable[[str], Path]) -> Callable[..., Config]:
    def make(name: str = "run", prediction: str = "v_prediction", **changes: Any) -> Config:
        settings = {"run.dir": tmp_path / name, "prior.path": priors(prediction)} | SMALL
        settings |= {key.replace("__", "."): value for key, value in changes.items()}
        return load_config(SMOKE, [f"{key}={value}" for key, value in settings.items()])

    return make


def lines_of(config: Config, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.run.dir) / name).read_text().splitlines()]


def status_of(config: Config) -> dict[str, Any]:
    status: dict[str, Any] = json.loads((Path(config.run.dir) / "STATUS.json").read_text())
    return status


def digest_of(config: Config) -> str:
    return verify_run(Path(config.run.dir), digest=True)[-1]


def built_with(monkeypatch: pytest.MonkeyPatch, change: Callable[[Run], None]) -> None:
    """Applies `change` to every run that is built from now on."""

    def build(*arguments: Any, **more: Any) -> Run:
        run = build_run(*arguments, **more)
        change(run)
        return run

    monkeypatch.setattr(trainer_module, "build_run", build)


def poison(run: Run) -> None:
    """Sets one parameter of particle 1 to NaN."""
    run.ensemble.parameters_of(1)["grid0"].view(-1)[5] = math.nan


@pytest.mark.parametrize(
    ("objective", "kind", "prediction"),
    [
        ("vsd", "nerf", "epsilon"),
        ("sds", "nerf", "v_prediction"),
        ("esd", "nerf", "sample"),
        ("vsd", "pixel", "sample"),
        ("sds", "latent", "epsilon"),
        ("esd", "pixel", "v_prediction"),
        ("vsd", "latent", "v_prediction"),
    ],
)
def test_every_objective_moves_every_kind_of_particle(
    configured: Callable[..., Config], objective: str, kind: str, prediction: str
) -> None:
    particle = {"particles__kind": "nerf"} if kind == "nerf" else {"particles__kind": "image"}
    space = {} if kind == "nerf" else {"particles__image__space": kind}
    config = configured(prediction=prediction, objective__kind=objective, **particle, **space)
    start = build_run(config, ALONE, lambda done: False).ensemble
    assert train(config) == 0
    lines = lines_of(config)
    assert [line["round"] for line in lines] == [1, 2]
    assert all(line.keys() >= METRICS and line["healthy"] == 2 for line in lines)
    expected = PHASES - {"exchange"} if objective == "sds" else PHASES | {"score"}
    assert all(line["phase_s"].keys() == expected for line in lines)
    assert all((line["score_loss"] is None) == (objective == "sds") for line in lines)
    assert [line["lag"] is None for line in lines] == [True, objective == "sds"]
    restored = load_particles(Path(config.run.dir))
    for particle_id in (0, 1):
        before, after = start.parameters_of(particle_id), restored.ensemble.parameters_of(particle_id)
        assert any(not torch.equal(before[name], after[name]) for name in before)
        assert all(value.isfinite().all() for value in after.values())


def test_vsd_without_guidance_starts_at_zero_and_not_later(configured: Callable[..., Config]) -> None:
    """The untrained score network equals the prior, so the gradient of Eq. 9 is zero before the first score step."""
    config = configured(prior__guidance_scale=1, prior__view_dependent="false", score__learning_rate=0.01)
    run = build_run(config, ALONE, lambda done: False)
    gradients = []
    for step in (0, 1):
        samples = run.loop.encode(*run.ensemble.render(step, 16), 16)
        gradients.append(run.loop.objective(samples, step).norm().item())
        run.loop.round(step)
    assert gradients[0] < 1e-4 * gradients[1]
    with_guidance = configured(prior__guidance_scale=5, prior__view_dependent="false")
    run = build_run(with_guidance, ALONE, lambda done: False)
    samples = run.loop.encode(*run.ensemble.render(0, 16), 16)
    assert run.loop.objective(samples, 0).norm().item() > 1e3 * gradients[0]


@pytest.mark.parametrize("changes", [{"particles__kind": "image"}, {"score__camera_drop": 1}], ids=["image", "dropped"])
def test_a_score_that_is_never_shown_a_camera_is_never_asked_with_one(
    configured: Callable[..., Config], changes: dict[str, Any]
) -> None:
    """An image looks the same from every camera; a network trained with all cameras dropped has never used one."""
    run = build_run(configured(**changes, score__learning_rate=0.01), ALONE, lambda done: False)
    for step in (0, 1):
        run.loop.round(step)
    samples = run.loop.encode(*run.ensemble.render(2, 16), 16).detached()
    t = torch.full_like(samples.ids, 500)
    asked = run.training.score.eps(samples.latents, t, samples.ids, samples.cameras)
    assert torch.equal(asked, run.training.score.eps(samples.latents, t, samples.ids, None))
    prior = run.prior.ask(samples.latents, t, run.prior.condition(samples.ids), GUIDED, ClassifierFree(1.0))
    assert not torch.equal(asked, prior.of("guided"))


@pytest.mark.parametrize("recompute", ["false", "true"])
@pytest.mark.parametrize(("asked", "edge"), [("native", 64), ("render", 16)])
def test_a_render_is_encoded_at_the_edge_that_the_prior_was_trained_at(
    configured: Callable[..., Config], tmp_path: Path, asked: str, edge: int, recompute: str
) -> None:
    """Stable Diffusion's layout, 64 pixels natively: renders of 16 come to the UNet as 8 x 8 latents, not as 2 x 2."""
    place = tiny_pipeline(tmp_path / "sd15", "sd15")
    config = configured(prior__path=place, render__encode_resolution=asked, particles__recompute=recompute)
    run = build_run(config, ALONE, lambda done: False)
    (views,) = run.ensemble.render(0, 16)
    samples = run.loop.encode(views, 16)
    assert samples.latents.shape == (2, 4, edge // 8, edge // 8)
    images = views[0].rendered.images.flatten(0, 1)
    enlarged = torch.nn.functional.interpolate(images, (edge, edge), mode="bilinear", align_corners=False)
    torch.testing.assert_close(samples.latents, run.prior.encode(enlarged), rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(samples.latents.square().sum(), views[0].rendered.images)
    assert gradient.isfinite().all() and (gradient != 0).flatten(1).any(1).all()
    # A rank without particles contributes latents of the same shape to the exchange.
    assert run.loop.encode([], 16).latents.shape[1:] == samples.latents.shape[1:]


def test_latents_of_which_the_prior_knows_nothing_are_refused_unless_asked_for(
    configured: Callable[..., Config], tmp_path: Path
) -> None:
    place = tiny_pipeline(tmp_path / "sd15", "sd15")
    small = {"prior__path": place, "render__resolution": 8, "render__encode_resolution": "render"}
    with pytest.raises(ConfigError, match=r"64 pixels.*small_latents"):
        train(configured(**small))
    run = build_run(configured(**small, render__small_latents="true"), ALONE, lambda done: False)
    assert run.loop.encode(*run.ensemble.render(0, 8), 8).latents.shape[2:] == (1, 1)


def test_a_run_of_a_version_without_newer_fields_goes_on_with_todays_values_and_says_so(
    configured: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    train(configured(score__init="kaiming"))
    longer = configured(score__init="kaiming", schedule__rounds=3)
    stored = Path(longer.run.dir) / "config.yaml"
    newer = ("  init:", "  betas:", "  eps:", "  encode_resolution:", "  small_latents:", "    entropy_of:")
    lines = [line for line in stored.read_text().splitlines() if not line.startswith(newer) or line == "  eps: 1.0e-15"]
    stored.write_text("\n".join(lines).replace("rounds: 2", "rounds: 3") + "\n")
    assert train(longer) == 0
    assert "score.init='kaiming'" in caplog.text and "encode_resolution" not in caplog.text
    rounds = (Path(longer.run.dir) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in rounds] == [1, 2, 3]


def test_an_image_is_asked_for_without_a_side(configured: Callable[..., Config]) -> None:
    texts = build_run(configured(particles__kind="image"), ALONE, lambda done: False).prior.texts
    assert texts.texts == ("a red cube", "")


def test_a_micro_batch_bounds_every_call_of_the_unet_and_changes_only_rounding(
    configured: Callable[..., Config],
) -> None:
    bounds: dict[int, int] = {}
    particles = {}
    for micro_batch in (0, 2):
        config = configured(score__micro_batch=micro_batch, particles__count=5, prior__guidance_scale=1)
        run = build_run(config, ALONE, lambda done: False)
        calls: list[tuple[Any, ...]] = []
        for unet in (run.prior.denoiser.module, run.training.score.network):
            unet.register_forward_pre_hook(lambda module, arguments, calls=calls: calls.append(arguments))
        for step in (0, 1):
            run.loop.round(step)
        bounds[micro_batch] = max(len(noisy) for noisy, *_ in calls)
        particles[micro_batch] = run.ensemble.parameters_of(4)["grid0"]
    assert bounds == {0: 5, 2: 2}
    torch.testing.assert_close(particles[0], particles[2], rtol=1e-3, atol=1e-4)


def test_a_run_goes_on_with_recomputed_renders_as_if_nothing_had_changed(configured: Callable[..., Config]) -> None:
    """A run that ran out of memory can be continued with particles.recompute, and ends with the same bits."""
    whole = configured("whole", schedule__rounds=4, checkpoint__every=2)
    train(whole)
    settings = {"schedule__rounds": 4, "checkpoint__every": 2, "checkpoint__asynchronous": "false"}
    with injected("eio@round:step=2"), pytest.raises(OSError, match="injected at round"):
        train(configured(**settings))
    config = configured(**settings, particles__recompute="true")
    assert train(config, resume="must") == 0
    assert digest_of(config) == digest_of(whole)


HOSTILE = {
    "empty": "",
    "10 kB": "a red cube, " * 854,
    "a path": "../../etc/passwd",
    "an absolute path": "/dev/null",
    "an option": "--resume never",
    "YAML": "x: [1, 2]\n- {a: &b !!python/object c}",
    "line separators": "a\x85b\u2028c\u2029\td\r\n",
    "control characters": "\x01\x1b[31m\x7f",
    "other scripts": "\u7ea2\u8272\u7acb\u65b9\u4f53 \U0001f9ca \u0645\u0643\u0639\u0628",
    "a template": "{config.run.dir} %s ${HOME} $(id)",
}


@pytest.mark.guarantee("G33")
@pytest.mark.parametrize("name", HOSTILE)
def test_any_prompt_trains_and_writes_inside_its_run_directory_only(
    configured: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A prompt is only ever text: whatever it holds, files appear in the run directory and nowhere else."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    config = dataclasses.replace(configured(schedule__rounds=1), prompt=HOSTILE[name])
    assert train(config) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "run"]
    assert not list(here.iterdir())
    assert load_config(tmp_path / "run" / "config.yaml").prompt == HOSTILE[name]
    assert train(config) == 0  # the same run, although its prompt went through a file


def test_a_finished_run_is_complete_on_the_disk(configured: Callable[..., Config]) -> None:
    config = configured(schedule__rounds=4, checkpoint__every=2, log__images_every=2, log__every=3)
    assert train(config) == 0
    root = Path(config.run.dir)
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    checkpoint = [
        "manifest.json",
        "particles/000000.safetensors",
        "particles/000001.safetensors",
        "score/adapter_config.json",
        "score/adapter_model.safetensors",
        "score/camera.safetensors",
        "score/optimizer.safetensors",
        "score/replay.safetensors",
    ]
    assert files == sorted(
        ["STATUS.json", "config.yaml", "health.jsonl", "metrics.jsonl", "renders/contact-sheet.png"]
        + [f"checkpoints/step-{step:08d}/{name}" for step in (2, 4) for name in checkpoint]
        + [f"renders/round-{step:08d}/particles-000000-000001/contact-sheet.png" for step in (2, 4)]
    )
    assert status_of(config).items() >= {"state": "done", "round": 4, "rounds": 4, "message": ""}.items()
    assert [line["round"] for line in lines_of(config)] == [3, 4]
    assert lines_of(config, "health.jsonl") == []
    with Image.open(root / "renders/contact-sheet.png") as sheet:
        assert sheet.width > 8 * 16 and sheet.height > 2 * 16


def test_the_package_itself_trains_again_and_again(configured: Callable[..., Config]) -> None:
    import distvsd

    for name in ("one", "two"):
        assert distvsd.train(configured(name, schedule__rounds=1)) == 0


def test_a_second_start_of_a_finished_run_changes_nothing(configured: Callable[..., Config]) -> None:
    config = configured(log__images_every=1)
    train(config)
    before, metrics = digest_of(config), lines_of(config)
    assert train(config) == 0
    assert digest_of(config) == before and lines_of(config) == metrics
    assert status_of(config)["state"] == "done"


def test_a_run_that_died_goes_on_and_logs_no_round_twice(
    configured: Callable[..., Config],
) -> None:
    whole = configured("whole", schedule__rounds=5, checkpoint__every=2)
    train(whole)
    config = configured(schedule__rounds=5, checkpoint__every=2, checkpoint__asynchronous="false")
    with injected("eio@round:step=3"), pytest.raises(OSError, match="injected at round"):
        train(config)
    status = status_of(config)
    assert (status["state"], status["round"]) == ("failed", 2)
    assert "injected at round" in status["message"]
    assert not (Path(config.run.dir) / "run.lock").exists()
    assert [line["round"] for line in lines_of(config)] == [1, 2, 3]
    assert train(config, resume="must") == 0
    assert [line["round"] for line in lines_of(config)] == [1, 2, 3, 4, 5]
    assert digest_of(config) == digest_of(whole)


def test_events_of_health_are_written_once_each_across_a_resume(
    configured: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also events between two lines of metrics, when a checkpoint is saved between those lines."""
    config = configured(schedule__rounds=5, checkpoint__every=2, log__every=3, checkpoint__asynchronous="false")
    with monkeypatch.context() as patched, injected("eio@round:step=3"), pytest.raises(OSError):
        built_with(patched, poison)
        train(config)
    assert [event["round"] for event in lines_of(config, "health.jsonl")] == [1, 2, 3]
    train(config)
    events = lines_of(config, "health.jsonl")
    assert [(event["round"], event["particle"]) for event in events] == [(n, 1) for n in (1, 2, 3, 4, 5)]


def test_a_particle_that_is_not_finite_is_counted_and_disturbs_nobody(
    configured: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(particles__count=3)
    built_with(monkeypatch, poison)
    assert train(config) == 0
    assert [line["healthy"] for line in lines_of(config)] == [2, 2]
    assert all(line["score_steps_skipped"] == 0 and math.isfinite(line["score_loss"]) for line in lines_of(config))
    restored = load_particles(Path(config.run.dir)).ensemble
    assert all(v.isfinite().all() for i in (0, 2) for v in restored.parameters_of(i).values())
    kept = restored.state()[1]
    assert int(kept["adam_step"]) == 0 and kept["param/grid0"].isnan().sum() == 1


def test_the_neighbours_of_a_lost_particle_move_as_if_it_were_sound(configured: Callable[..., Config]) -> None:
    """Bit for bit in the first round; later the shared score network was trained on fewer renders."""
    config = configured(particles__count=3)
    sound, lost = (build_run(config, ALONE, lambda done: False) for _ in range(2))
    poison(lost)
    assert sound.loop.round(0).update.healthy == [0, 1, 2]
    assert lost.loop.round(0).update.unhealthy == [1]
    for particle_id in (0, 2):
        ours, theirs = (run.ensemble.parameters_of(particle_id) for run in (lost, sound))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_directory_of_another_configuration_is_refused_with_what_differs(configured: Callable[..., Config]) -> None:
    config = configured()
    train(config)
    other = configured(particles__learning_rate=0.5, log__every=2)
    with pytest.raises(RunError, match=r"another configuration \(particles.learning_rate: .* became 0.5\)"):
        train(other)
    assert status_of(config)["state"] == "done"
    with pytest.raises(RunError, match=r"prompt: .* became 'xxx") as refusal:
        train(configured(prompt="x" * 90_000))
    assert len(str(refusal.value)) < 2000
    longer = configured(schedule__rounds=3)
    with pytest.raises(RunError, match=r"schedule\.rounds: 2 became 3"):
        train(longer)
    assert train(longer, resume="must") == 0
    assert [line["round"] for line in lines_of(longer)] == [1, 2, 3]
    with pytest.raises(RunError, match="--resume auto"):
        train(longer, resume="never")


def test_a_shorter_schedule_on_resume_ends_at_once_and_keeps_the_state(configured: Callable[..., Config]) -> None:
    config = configured(schedule__rounds=3)
    train(config)
    before = digest_of(config)
    assert train(configured(schedule__rounds=2), resume="must") == 0
    assert digest_of(config) == before
    assert [path.name for path in (Path(config.run.dir) / "checkpoints").iterdir()] == ["step-00000003"]


def test_only_a_resume_that_must_find_a_run_complains_of_a_fresh_directory(configured: Callable[..., Config]) -> None:
    with pytest.raises(RunError, match="holds no run to resume"):
        train(configured("fresh"), resume="must")
    assert train(configured("fresh", schedule__rounds=1), resume="never") == 0


def test_a_run_directory_that_is_a_file_is_refused(configured: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for directory in ("file", "file/below"):
        with pytest.raises(RunError, match="is a file"):
            train(configured(directory))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("count", [0, -3])
def test_no_particle_at_all_is_refused_before_anything_is_made(
    configured: Callable[..., Config], tmp_path: Path, count: int
) -> None:
    with pytest.raises(ConfigError, match=f"particles.count is {count}; allowed: an integer at least 1"):
        configured(particles__count=count)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_prior_with_a_nan_is_refused_with_the_name_of_the_tensor(
    configured: Callable[..., Config], priors: Callable[[], Path], tmp_path: Path, component: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(priors(), broken)
    (weights,) = (broken / component).glob("*.safetensors")
    tensors = load_file(weights)
    name = sorted(tensors)[len(tensors) // 2]
    tensors[name].view(-1)[0] = math.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    config = configured(prior__path=broken)
    with pytest.raises(PriorError, match=name.removeprefix("text_model.")):
        train(config)
    status = status_of(config)
    assert status["state"] == "failed" and name.removeprefix("text_model.") in status["message"]


def test_resuming_against_another_prior_or_count_is_refused(
    configured: Callable[..., Config], tmp_path: Path, priors: Callable[[], Path]
) -> None:
    config = configured()
    train(config)
    with pytest.raises(CheckpointError, match=r"holds 2 particles, but particles.count is 3"):
        train(configured(particles__count=3), resume="must")
    other = tiny_pipeline(tmp_path / "other", "shapes", "v_prediction", seed=5)
    with pytest.raises(CheckpointError, match="against another prior"):
        train(configured(prior__path=other), resume="must")


def test_a_checkpoint_with_an_identity_of_the_older_rule_is_resumed(
    configured: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older version hashed files by another rule and wrote 64 hex digits without a prefix."""
    config = configured(prior__path="shapes", schedule__rounds=1)

    def stored() -> str:
        newest = max((Path(config.run.dir) / "checkpoints").glob("*/manifest.json"))
        return str(json.loads(newest.read_text())["prior_identity"])

    with monkeypatch.context() as older:
        older.setattr(Identity, "current", lambda self: EMBEDDED_BEFORE)
        train(config)
    assert stored() == EMBEDDED_BEFORE
    assert train(configured(prior__path="shapes", schedule__rounds=2), resume="must") == 0
    assert stored().startswith("v2:")
    with monkeypatch.context() as older:
        older.setattr(Identity, "current", lambda self: EMBEDDED_BEFORE[::-1])
        train(configured("other", prior__path="shapes", schedule__rounds=1))
    with pytest.raises(CheckpointError, match="against another prior"):
        train(configured("other", prior__path="shapes", schedule__rounds=2), resume="must")


def test_a_change_that_cannot_be_resumed_leaves_the_run_as_it_was(configured: Callable[..., Config]) -> None:
    config = configured()
    train(config)
    with pytest.raises(CheckpointError, match="resume with that count"):
        train(configured(particles__count=3, schedule__rounds=4), resume="must")
    assert load_config(Path(config.run.dir) / "config.yaml").particles.count == 2
    assert train(config) == 0


def test_pictures_that_cannot_be_drawn_do_not_undo_a_finished_run(
    configured: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pictures_module, "contact_sheets", no_space)
    config = configured(log__images_every=1)
    assert train(config) == 0
    assert status_of(config)["state"] == "done"
