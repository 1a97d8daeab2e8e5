"""Reading valid configurations: defaults, layers, number forms, texts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from distvsd.config import Config, Schedule, load_config, to_dict, to_yaml


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def test_what_is_not_written_has_its_default(tmp_path: Path) -> None:
    assert load(tmp_path, "prompt: an object\n") == Config()


def test_defaults_are_the_papers(tmp_path: Path) -> None:
    config = load(tmp_path, "run: {seed: 0}")
    assert (config.prior.guidance_scale, config.score.rank, config.score.learning_rate) == (7.5, 4, 1e-4)
    assert (config.particles.nerf.levels, config.particles.nerf.log2_table_size) == (16, 19)
    assert (config.particles.betas, config.particles.eps) == ((0.9, 0.99), 1e-15)


def test_fields_of_one_section_leave_the_others_alone(tmp_path: Path) -> None:
    config = load(tmp_path, "particles:\n  nerf: {levels: 3}\n  count: 5\n")
    assert (config.particles.nerf.levels, config.particles.nerf.features, config.particles.count) == (3, 2, 5)


def test_overrides_come_last_and_the_last_of_them_wins(tmp_path: Path) -> None:
    config = load(tmp_path, "particles: {count: 2, views: 3}", "particles.count=4", "particles.count=7")
    assert (config.particles.count, config.particles.views) == (7, 3)


def test_an_override_of_a_section_changes_only_what_it_names(tmp_path: Path) -> None:
    config = load(tmp_path, "particles: {nerf: {levels: 3}}", "particles.nerf={features: 8}")
    assert (config.particles.nerf.levels, config.particles.nerf.features) == (3, 8)


def test_an_override_replaces_a_schedule_as_a_whole(tmp_path: Path) -> None:
    config = load(tmp_path, "objective: {t_max: {0: 0.9, 10: 0.8}}", "objective.t_max={0: 0.7}")
    assert config.objective.t_max == Schedule.constant(0.7)


def test_an_override_repairs_a_mistake_in_the_file(tmp_path: Path) -> None:
    assert load(tmp_path, "particles: {count: 0}", "particles.count=1").particles.count == 1


@pytest.mark.parametrize("text", ["1e-3", "0.001", '"1e-3"', "1.0e-3", "1E-3"])
def test_floats_may_be_written_in_every_usual_form(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, f"score: {{learning_rate: {text}}}").score.learning_rate == 1e-3


def test_whole_numbers_are_floats_where_a_float_is_wanted(tmp_path: Path) -> None:
    value = load(tmp_path, "prior: {guidance_scale: 5}").prior.guidance_scale
    assert (value, type(value)) == (5.0, float)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x" * 10_000,
        "/etc/passwd",
        "../runs/a",
        "a: b # [c] {d}",
        "yes",
        "12",
        "two\nlines",
        "caf\u00e9 \u4e16\u754c \U0001f600",
    ],
)
def test_a_prompt_may_be_any_text(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(Config(prompt=text)), encoding="utf-8")
    assert load_config(path).prompt == text


def test_a_pair_of_surrogates_as_json_writes_it_is_one_character(tmp_path: Path) -> None:
    text = json.dumps({"prompt": "a \U0001f600", "log": {"wandb_name": "\U00010348"}})
    assert text.isascii()
    config = load(tmp_path, text, 'log.wandb_group="\\ud83d\\ude00"')
    assert (config.prompt, config.log.wandb_name) == ("a \U0001f600", "\U00010348")
    assert config.log.wandb_group == "\U0001f600"


def test_an_override_may_empty_the_prompt(tmp_path: Path) -> None:
    assert load(tmp_path, "prompt: a cube", "prompt=").prompt == ""


def test_an_override_keeps_spaces_and_equals_signs_of_a_prompt(tmp_path: Path) -> None:
    assert load(tmp_path, "{}", "prompt=a cube, x=y").prompt == "a cube, x=y"


def test_a_list_of_prompts_goes_to_the_particles_in_order(tmp_path: Path) -> None:
    config = load(tmp_path, "prompt: [a, b, c]\nparticles: {count: 3}")
    assert config.prompts == ("a", "b", "c")


def test_one_prompt_is_for_all_particles_also_as_a_list(tmp_path: Path) -> None:
    single, listed = (load(tmp_path, f"prompt: {text}\nparticles: {{count: 3}}") for text in ("a", "[a]"))
    assert single == listed
    assert listed.prompts == ("a", "a", "a")


def test_schedules_have_three_forms(tmp_path: Path) -> None:
    text = "objective: {t_max: {5000: 0.5, 0: 0.98}}\nrender: {resolution: {linear: {0: 64, 5000: 512}}}\n"
    config = load(tmp_path, text + "particles: {learning_rate: 1e-2}")
    assert config.objective.t_max == Schedule(((0, 0.98), (5000, 0.5)), "step")
    assert config.render.resolution == Schedule(((0, 64.0), (5000, 512.0)), "linear")
    assert config.particles.learning_rate == Schedule.constant(0.01)


def test_aliases_and_a_byte_order_mark_are_yaml_like_any_other(tmp_path: Path) -> None:
    config = load(tmp_path, "\ufeffcameras: {fovy: &range [40, 50], azimuth: *range}")
    assert config.cameras.azimuth == config.cameras.fovy == (40.0, 50.0)


def test_bare_off_turns_wandb_off_although_yaml_reads_it_as_false(tmp_path: Path) -> None:
    assert load(tmp_path, "log: {wandb: off}").log.wandb == "off"


def test_the_order_of_sections_is_fixed() -> None:
    expected = "run prompt prior objective particles cameras render score schedule parallel checkpoint log"
    assert " ".join(to_dict(Config())) == expected


def test_reading_a_configuration_imports_no_torch() -> None:
    code = "import sys, distvsd.config, distvsd.config.reference, distvsd.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
