"""Stages: read, refused, written and read back like every other part of a configuration."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from distvsd.config import Config, Schedule, config_from, diff, digest, load_config, to_dict, to_yaml
from distvsd.errors import ConfigError

TEXT = """prompt: a cube
particles: {count: 3}
schedule: {rounds: 10}
stages:
- name: coarse
  schedule: {rounds: 4}
- name: fine
  objective: {t_max: {0: 0.5, 9: 0.3}}
  particles:
    learning_rate: 1e-3
    nerf: {entropy: 2}
  prior: {guidance_scale: 3}
"""


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def test_a_stage_is_the_configuration_with_its_own_fields_changed(tmp_path: Path) -> None:
    config = load(tmp_path, TEXT)
    coarse, fine = config.stage_configs
    assert [stage.name for stage in config.stages] == ["coarse", "fine"]
    assert coarse == replace(config, stages=(), schedule=replace(config.schedule, rounds=4))
    assert (fine.schedule.rounds, fine.prior.guidance_scale, fine.particles.nerf.entropy) == (10, 3.0, 2.0)
    assert fine.objective.t_max == Schedule(((0, 0.5), (9, 0.3)))
    assert (fine.particles.count, fine.prompt, fine.prior.path) == (3, "a cube", "shapes")


def test_a_configuration_without_stages_is_its_own_only_stage() -> None:
    assert Config().stage_configs == (Config(),)


def test_overrides_reach_a_stage_by_its_number_and_the_whole_run_without_one(tmp_path: Path) -> None:
    config = load(tmp_path, TEXT, "stages.1.schedule.rounds=3", "schedule.rounds=7", "stages.2.name=last")
    assert [stage.schedule.rounds for stage in config.stage_configs] == [3, 7]
    assert config.stages[1].name == "last"
    config = load(tmp_path, TEXT, "stages.2.particles.nerf={levels: 3}")
    assert config.stage_configs[1].particles.nerf.levels == 3
    assert config.stage_configs[1].particles.nerf.entropy == 2


def test_an_override_with_a_list_replaces_all_stages(tmp_path: Path) -> None:
    config = load(tmp_path, TEXT, "stages.1.schedule.rounds=3", "stages=[{name: only, score: {rank: 2}}]")
    assert [(stage.name, stage.changes) for stage in config.stages] == [("only", (("score.rank", 2),))]


def test_stages_read_back_from_yaml_and_from_a_manifest(tmp_path: Path) -> None:
    config = load(tmp_path, TEXT)
    assert load(tmp_path, to_yaml(config)) == config
    assert config_from(json.loads(json.dumps(to_dict(config))), "the manifest") == config


def test_without_stages_nothing_of_them_is_written() -> None:
    assert "stages" not in to_dict(Config()) and "stages" not in to_yaml(Config())


def test_the_digest_sees_what_a_stage_changes_but_not_its_bookkeeping(tmp_path: Path) -> None:
    config = load(tmp_path, TEXT)
    assert digest(load(tmp_path, TEXT, "stages.2.schedule.rounds=11")) != digest(config)
    assert digest(load(tmp_path, TEXT, "stages.2.particles.recompute=true")) == digest(config)


def test_the_difference_of_two_configurations_names_the_stage(tmp_path: Path) -> None:
    config = load(tmp_path, TEXT)
    other = load(tmp_path, TEXT, "stages.1.schedule.rounds=5", "stages.2.score.rank=2")
    assert diff(config, other) == [("stages.1.schedule.rounds", 4, 5), ("stages.2.score.rank", None, 2)]


# (stages, line of the mistake, what the message must contain besides the place)
BAD = [
    ("stages: 3", 1, ["stages is 3", "a list"]),
    ("stages: {1: {name: a}}", 1, ["stages.1 is not there"]),
    ("stages:\n- 3", 2, ["stages.1 is 3", "section"]),
    ("stages:\n- schedule: {rounds: 3}", 2, ["stages.1 has no name"]),
    ("stages:\n- name: ../up", 2, ["stages.1.name is the text '../up'", "letters, digits"]),
    ("stages:\n- name: 7", 2, ["stages.1.name is 7", "quotes"]),
    ("stages:\n- name: a\n- name: b\n  schedule: {rounds: 0}", 4, ["stages.2.schedule.rounds is 0", "at least 1"]),
    ("stages:\n- name: a\n  schedule: {ronds: 3}", 3, ["stages.1.schedule.ronds", "mean stages.1.schedule.rounds?"]),
    ("stages:\n- name: a\n  rounds: 3", 3, ["stages.1.rounds", "did you mean stages.1.schedule.rounds?"]),
    ("stages:\n- name: a\n  particles: {count: 3}", 3, ["stages.1.particles.count", "set particles.count"]),
    ("stages:\n- name: a\n  prior: {path: x}", 3, ["stages.1.prior.path", "set prior.path"]),
    ("stages:\n- name: a\n  run: {seed: 3}", 3, ["stages.1.run", "whole run"]),
    ("stages:\n- name: a\n  stages: []", 3, ["stages.1.stages", "whole run"]),
    ("stages:\n- name: a\n  objective: {t_min: 0.99}", 3, ["stages.1.objective.t_min is 0.99", "t_max is 0.98"]),
    ("stages:\n- name: a\n  objective: {t_max: 0.01}", 3, ["stages.1.objective.t_min is 0.02", "t_max is 0.01"]),
]


@pytest.mark.parametrize(("text", "line", "hints"), BAD, ids=[text[8:50] for text, _, _ in BAD])
def test_a_mistake_in_a_stage_is_refused_with_its_place_and_what_to_do(
    tmp_path: Path, text: str, line: int, hints: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert f"run.yaml:{line}: " in str(caught.value)
    assert all(hint in str(caught.value) for hint in hints), str(caught.value)
    assert "1 mistake " in str(caught.value)


@pytest.mark.parametrize("override", ["stages.3.schedule.rounds=2", "stages.0.schedule.rounds=2", "stages.x.name=a"])
def test_an_override_of_a_stage_that_is_not_there_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="stages 1 to 2"):
        load(tmp_path, TEXT, override)


def test_a_mistake_of_the_whole_run_is_told_once_whatever_the_number_of_stages(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1 mistake in"):
        load(tmp_path, TEXT, "prompt=[a, b]")


def test_stages_are_limited_in_length_so_that_what_is_written_can_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stages take .* at most"):
        load(tmp_path, TEXT, f"stages.2.prior.negative_prompt={'x' * 40_000}")
