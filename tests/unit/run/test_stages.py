"""Runs of several stages: what they write, what one hands over to the next, and where a resume continues."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distvsd.checkpoint.reader import newest
from distvsd.cli import main
from distvsd.config import Config, load_config
from distvsd.errors import CheckpointError, ConfigError, RunError
from distvsd.faults import injected
from distvsd.looking.opened import load_particles
from distvsd.parallel.world import World
from distvsd.run.contents import verify
from distvsd.run.train import train
from distvsd.stages import newest_stage, stages_of
from distvsd.testing.ranks import run_ranks
from tests.small_run import SMOKE, overrides

STAGES = """[
  {name: coarse, schedule: {rounds: 2}, render: {resolution: 8}},
  {name: fine, objective: {t_max: 0.5, t_min: 0.02}, particles: {learning_rate: 0.001}, score: {rank: 2}},
]"""
FOLDERS = ("stages/1-coarse", "stages/2-fine")


@pytest.fixture
def configured(tmp_path: Path, prior: Path) -> Callable[..., Config]:
    """Two fields in exact numerics: two rounds at 8 pixels, then three at 16 with a lower rate."""

    def make(name: str = "run", *more: str, **changes: Any) -> Config:
        return staged(tmp_path / name, prior, *more, **changes)

    return make


def staged(run: Path, prior: Path, *more: str, **changes: Any) -> Config:
    settings = {"stages": STAGES, "schedule.rounds": 3, "checkpoint.every": 1, "particles.count": 2, "log.every": 1}
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return load_config(SMOKE, [*overrides(run, prior, **settings), *more])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, prior: Path) -> Config:
    """The run of `configured`, trained without a stop; tests must not write to it."""
    config = staged(tmp_path_factory.mktemp("whole") / "run", prior)
    assert train(config) == 0
    return config


@pytest.fixture
def finished(whole: Config, configured: Callable[..., Config]) -> Config:
    """A copy of `whole`, which the test may change."""
    config = configured()
    shutil.copytree(whole.run.dir, config.run.dir)
    return config


def root_of(config: Config) -> Path:
    return Path(config.run.dir)


def status_of(folder: Path) -> tuple[str, int, int]:
    status = json.loads((folder / "STATUS.json").read_text())
    return status["state"], status["round"], status["rounds"]


def digest_of(config: Config) -> str:
    return verify(root_of(config), digest=True)[-1]


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


def test_each_stage_leaves_a_whole_run_directory_and_the_run_its_status(whole: Config) -> None:
    root = root_of(whole)
    assert sorted(path.name for path in root.iterdir()) == ["STATUS.json", "config.yaml", "stages"]
    assert status_of(root) == ("done", 5, 5)
    for number, (folder, rounds) in enumerate(zip(FOLDERS, (2, 3), strict=True)):
        stage = root / folder
        assert status_of(stage) == ("done", rounds, rounds)
        assert (stage / "renders/contact-sheet.png").is_file()
        assert len((stage / "metrics.jsonl").read_text().splitlines()) == rounds
        assert load_config(stage / "config.yaml") == stages_of(whole)[number].config
        assert load_particles(stage).step == rounds
    assert load_config(root / "config.yaml") == whole


def test_a_stage_begins_with_the_particles_of_the_one_before_and_a_new_score_network(
    configured: Callable[..., Config],
) -> None:
    """With rates of zero the second stage keeps what it was given, bit for bit; its optimisers begin at zero."""
    config = configured("run", "stages.2.particles.learning_rate=0", "stages.2.particles.network_learning_rate=0")
    assert train(config) == 0
    first, second = (newest(root_of(config) / folder / "checkpoints") for folder in FOLDERS)
    assert first is not None and second is not None
    for particle in range(2):
        before, after = (found.read(f"particles/{particle:06d}.safetensors") for found in (first, second))
        names = [name for name in before if name.startswith("param/")]
        assert names and all(torch.equal(before[name], after[name]) for name in names)
        assert (int(before["adam_step"]), int(after["adam_step"])) == (2, 3)
    assert int(second.read("score/optimizer.safetensors")["num_steps"]) == 3


def test_the_first_stage_is_the_run_it_would_be_alone(configured: Callable[..., Config], whole: Config) -> None:
    alone = configured("alone", "stages=[]", schedule__rounds=2, render__resolution=8)
    train(alone)
    first = verify(root_of(whole) / FOLDERS[0], digest=True)
    assert first == verify(root_of(alone), digest=True)


def test_two_ranks_give_the_bits_of_one(configured: Callable[..., Config], whole: Config) -> None:
    shared = configured("shared")
    assert run_ranks(lambda world: train(shared), 2) == [0, 0]
    assert digest_of(shared) == digest_of(whole)


@pytest.mark.parametrize(
    ("fault", "reached"),
    [
        ("eio@round:step=1", ["step-00000001"]),
        ("eio@round:step=1:nth=2", ["step-00000001", "step-00000002", "step-00000001"]),
        ("eio@load:nth=2", ["step-00000001", "step-00000002"]),
    ],
    ids=["in the first stage", "in the second stage", "between them"],
)
@pytest.mark.parametrize("size", [1, 2])
def test_a_run_that_died_goes_on_in_the_stage_it_was_in(
    configured: Callable[..., Config], whole: Config, fault: str, reached: list[str], size: int
) -> None:
    config = configured(checkpoint__asynchronous="false")

    def attempt(world: World) -> int:
        try:
            with injected(fault):
                return train(config)
        except OSError:
            return -1
        except RunError as error:
            return -1 if "injected" in str(error) else -2

    if size == 1:
        assert attempt(World(0, 1, 0, 1, torch.device("cpu"))) == -1
    else:
        assert run_ranks(attempt, size) == [-1] * size
    root = root_of(config)
    assert status_of(root)[0] == "failed"
    assert [name for folder in FOLDERS if (root / folder).is_dir() for name in saved(root / folder)] == reached
    assert run_ranks(lambda world: train(config), size) == [0] * size
    assert digest_of(config) == digest_of(whole)
    assert status_of(root) == ("done", 5, 5)


@pytest.mark.parametrize("step", [0, 1], ids=["in the second stage", "in the last round of the first"])
def test_a_run_that_is_told_to_stop_saves_and_goes_on_in_the_right_stage(
    configured: Callable[..., Config], whole: Config, step: int
) -> None:
    config = configured()
    nth = 2 if step == 0 else 1
    with injected(f"term@round:step={step}:nth={nth}"):
        assert train(config) == 3
    root = root_of(config)
    assert status_of(root) == ("preempted", 3 if step == 0 else 2, 5)
    assert (root / FOLDERS[1] / "checkpoints").exists() == (step == 0)
    assert train(config) == 0
    assert digest_of(config) == digest_of(whole)


def test_a_finished_run_of_stages_is_left_as_it_is(finished: Config, whole: Config) -> None:
    assert train(finished) == 0
    assert digest_of(finished) == digest_of(whole) and status_of(root_of(finished)) == ("done", 5, 5)


def test_the_last_stage_may_be_made_longer_and_changes_of_one_that_is_over_are_told(
    finished: Config, configured: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    longer = configured("run", "stages.2.schedule.rounds=4", "stages.1.schedule.rounds=7")
    with pytest.raises(RunError, match=r"stages\.1\.schedule\.rounds: 2 became 7"):
        train(longer)
    assert train(longer, resume="must") == 0
    root = root_of(longer)
    assert status_of(root / FOLDERS[1]) == ("done", 4, 4)
    assert status_of(root / FOLDERS[0]) == ("done", 2, 2)
    assert "1-coarse is over" in caplog.text and "schedule.rounds" in caplog.text
    assert load_config(root / "config.yaml") == longer


def test_a_directory_with_checkpoints_of_other_stages_is_refused(
    finished: Config, configured: Callable[..., Config]
) -> None:
    renamed = configured("run", "stages.1.name=first")
    with pytest.raises(RunError, match="1-coarse holds checkpoints"):
        train(renamed, resume="must")
    with pytest.raises(RunError, match="1-coarse holds checkpoints"):
        train(configured("run", "stages=[]"), resume="must")
    train(configured("plain", "stages=[]", schedule__rounds=1))
    with pytest.raises(RunError, match="plain holds checkpoints"):
        train(configured("plain"), resume="must")


@pytest.mark.parametrize(
    "change", ["particles.nerf.levels=1", "particles.kind=image", "particles={kind: image, image: {space: latent}}"]
)
def test_particles_that_the_next_stage_cannot_begin_from_are_refused_before_anything_is_trained(
    configured: Callable[..., Config], change: str
) -> None:
    config = configured("run", f"stages.2.{change}")
    with pytest.raises(ConfigError, match=r"2-fine cannot begin from .*1-coarse.* NerfParticle"):
        train(config)
    assert not root_of(config).exists()


def test_a_link_in_the_place_of_a_stage_is_not_followed(configured: Callable[..., Config], tmp_path: Path) -> None:
    config = configured()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    root_of(config).mkdir()
    (root_of(config) / "stages").mkdir()
    (root_of(config) / FOLDERS[0]).symlink_to(elsewhere)
    with pytest.raises(RunError, match="symbolic link"):
        train(config)
    assert not list(elsewhere.iterdir())


def test_commands_on_a_run_act_on_its_newest_stage_and_verify_on_all(
    finished: Config, capfd: pytest.CaptureFixture[str]
) -> None:
    root = root_of(finished)
    shutil.rmtree(root / FOLDERS[1] / "renders")
    capfd.readouterr()
    assert main(["render", str(root)]) == 0
    assert f"{FOLDERS[1]}/renders/contact-sheet.png" in capfd.readouterr().out
    assert main(["evaluate", str(root), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["particles"] == 2
    assert (root / FOLDERS[1] / "evaluation.json").is_file()
    assert main(["verify", str(root)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        f"{stage}/step-{step:08d}" for stage, step in (("1-coarse", 2), ("1-coarse", 1), ("2-fine", 3), ("2-fine", 2))
    ]
    shutil.rmtree(root / FOLDERS[1] / "checkpoints")
    assert newest_stage(root) == root / FOLDERS[0]


def test_verifying_finds_damage_in_any_stage(finished: Config) -> None:
    for folder in FOLDERS:
        particle = max((root_of(finished) / folder / "checkpoints").iterdir()) / "particles/000001.safetensors"
        particle.write_bytes(particle.read_bytes()[:-1] + b"\x7f")
    assert main(["verify", str(root_of(finished))]) == 1
    with pytest.raises(CheckpointError, match=r"1-coarse.*2-fine"):
        verify(root_of(finished))


def test_latent_images_go_from_one_objective_to_another(configured: Callable[..., Config]) -> None:
    """The first stage trains no score network, and reading latent images needs the prior."""
    stages = "[{name: sds, objective: {kind: sds}}, {name: vsd}]"
    kind = {"particles__kind": "image", "particles__image__space": "latent", "particles__image__init_color": 0.2}
    config = configured("run", f"stages={stages}", **kind, schedule__rounds=1, render__resolution=64)
    assert run_ranks(lambda world: train(config), 2) == [0, 0]
    root = root_of(config)
    kept = [sorted((root / "stages").glob(f"{stage}/checkpoints/*/score")) for stage in ("1-sds", "2-vsd")]
    assert [len(list(folder.iterdir())) for folders in kept for folder in folders] == [0, 4]
    assert len(verify(root)) == 2
