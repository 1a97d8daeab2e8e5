"""The stages of a run as paths and configurations."""

from __future__ import annotations

from pathlib import Path

import pytest

from distvsd.config import Config, StageConfig, config_from
from distvsd.errors import RunError
from distvsd.runtime.status import read_status
from distvsd.stages import Stage, newest_stage, stage_folders, stages_of

TWO = (StageConfig("coarse", (("schedule.rounds", 30),)), StageConfig("fine"))


def configured(run: Path, *stages: StageConfig) -> Config:
    config = config_from({"run": {"dir": str(run)}, "schedule": {"rounds": 50}}, "a test")
    return Config(run=config.run, schedule=config.schedule, stages=stages)


def begun(run: Path, stage: str) -> None:
    (run / "stages" / stage / "checkpoints" / "step-00000001").mkdir(parents=True)


def test_a_run_without_stages_is_one_stage_in_its_own_directory(tmp_path: Path) -> None:
    config = configured(tmp_path)
    (only,) = stages_of(config)
    assert (only.config, only.paths.root, only.count) == (config, tmp_path, 1)


def test_each_stage_has_a_directory_and_a_name_in_weights_and_biases_of_its_own(tmp_path: Path) -> None:
    stages = stages_of(configured(tmp_path / "a", *TWO))
    assert [stage.paths.root for stage in stages] == [tmp_path / "a/stages/1-coarse", tmp_path / "a/stages/2-fine"]
    assert [stage.config.run.dir for stage in stages] == [str(stage.paths.root) for stage in stages]
    assert [stage.config.log.wandb_name for stage in stages] == ["a 1-coarse", "a 2-fine"]


@pytest.mark.parametrize(
    ("number", "state", "completed", "run"),
    [
        (1, "running", 3, ("running", 3, 80)),
        (1, "done", 30, ("running", 30, 80)),
        (2, "preempted", 4, ("preempted", 34, 80)),
        (2, "done", 50, ("done", 80, 80)),
    ],
)
def test_the_status_of_the_run_counts_the_rounds_of_all_stages(
    tmp_path: Path, number: int, state: str, completed: int, run: tuple[str, int, int]
) -> None:
    stage = Stage(configured(tmp_path, *TWO), number)
    stage.create()
    stage.report(state, completed, "why")  # type: ignore[arg-type]
    own, whole = read_status(stage.paths.status), read_status(stage.run.status)
    assert own is not None and (own["state"], own["round"]) == (state, completed)
    assert whole is not None and (whole["state"], whole["round"], whole["rounds"]) == run


def test_the_newest_stage_is_the_last_one_with_a_checkpoint_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    assert newest_stage(tmp_path) == tmp_path
    for number in range(1, 12):
        (tmp_path / f"stages/{number}-s").mkdir(parents=True)
    (tmp_path / "stages/notes").mkdir()
    assert newest_stage(tmp_path) == tmp_path / "stages/1-s"
    begun(tmp_path, "2-s")
    begun(tmp_path, "10-s")
    assert newest_stage(tmp_path) == tmp_path / "stages/10-s"
    assert [folder.name for folder in stage_folders(tmp_path)] == [f"{number}-s" for number in range(1, 12)]


@pytest.mark.parametrize("name", ["stages", "stages/1-coarse"])
def test_a_link_among_the_stages_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "run" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="symbolic link"):
        newest_stage(tmp_path / "run")
