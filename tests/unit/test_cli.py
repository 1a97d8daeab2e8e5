"""The command line as a caller sees it: exit codes, output streams, and the functions that it calls."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distvsd.cli import main
from distvsd.config import Config, load_config
from distvsd.errors import CheckpointError, ConfigError, DistvsdError, RankError

ROOT = Path(__file__).parents[2]
SECOND_OF_TWO = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text("prompt: a cube\nparticles: {count: 2}\n")
    return str(path)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces a room that the command line calls by a module with the given functions."""

    def place(name: str, **functions: Any) -> None:
        module = types.ModuleType(name)
        module.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, name, module)

    return place


def shell(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distvsd", *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
        cwd=ROOT,
    )


def test_a_dry_run_prints_the_resolved_configuration_and_nothing_else(tmp_path: Path, config: str) -> None:
    done = shell("train", config, "score.rank=8", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(done.stdout)
    assert load_config(resolved) == load_config(config, ["score.rank=8"])


def test_a_wrong_configuration_ends_with_2_and_one_paragraph_without_traceback(config: str) -> None:
    done = shell("train", config, "particles.cuont=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("distvsd: error: 1 mistake in the configuration")
    assert "did you mean particles.count?" in done.stderr
    assert "Traceback" not in done.stderr


def test_only_the_first_rank_prints_a_mistake_but_every_rank_ends_with_2(config: str) -> None:
    done = shell("train", config, "particles.cuont=3", **SECOND_OF_TWO)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_a_rank_left_over_in_the_environment_silences_nothing(config: str) -> None:
    """Only a launcher makes a second rank: RANK alone, in a world of one, or without a valid number does not."""
    for environment in ({"RANK": "1"}, {"RANK": "1", "WORLD_SIZE": "1"}, {"RANK": "x", "WORLD_SIZE": "2"}):
        done = shell("train", config, "particles.cuont=3", **environment)
        assert done.returncode == 2 and "did you mean particles.count?" in done.stderr
        done = shell("train", config, "--dry-run", **environment)
        assert done.returncode == 0 and "prompt: a cube" in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        "trian",
        "train",
        "train CONFIG --resume perhaps",
        "train CONFIG --dry-rnu",
        "plan CONFIG --nodes 0",
        "verify CONFIG x=3",
        "prior",
        "prior sample cube",
        "export . --format stl",
        "export . --particles 1,,2",
        "export . --texture 10",
    ],
)
def test_wrong_usage_ends_with_2(config: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(command.replace("CONFIG", config).split())
    assert caught.value.code == 2
    assert "usage: distvsd" in capsys.readouterr().err


ODD = ["", "x", "0x10", "1e3", "1_0", "nan", "inf", "-inf", "9" * 400, "-" + "9" * 5000, "-1", "\u0661", "1.5", "\x1b"]
NUMBERS = [
    *(("plan CONFIG", option) for option in ("--nodes", "--gpus-per-node", "--round-s", "--disk-mb-s", "--restart-s")),
    *(("plan CONFIG", option) for option in ("--node-mtbf-days", "--gflops", "--gbps")),
    *(("export .", option) for option in ("--texture", "--resolution", "--particles", "--threshold")),
    *(("prior sample a --out a.png", option) for option in ("--count", "--steps", "--seed", "--guidance-scale")),
    *(("prior build a", option) for option in ("--seed", "--num-images", "--steps", "--batch-size", "--learning-rate")),
]


@pytest.mark.parametrize(("command", "option"), NUMBERS)
def test_a_number_that_cannot_be_is_wrong_usage(
    config: str, command: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    accepts_fractions = option.endswith(("-s", "-days", "-scale", "-rate", "-threshold", "-gflops", "-gbps"))
    for word in ODD:
        if accepts_fractions and word in ("1e3", "1_0", "1.5", "\u0661"):
            continue
        with pytest.raises(SystemExit) as caught:
            main([*command.replace("CONFIG", config).split(), f"{option}={word}"])
        assert caught.value.code == 2
        said = capsys.readouterr().err
        assert option in said and len(said) < 2000 and "\x1b" not in said


def test_text_that_is_not_utf8_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["prior", "sample", os.fsdecode(b"caf\xe9"), "--out", str(tmp_path / "a.png")])
    assert caught.value.code == 2 and "not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a" * 300 + ".png", "/dev/null/a.png", "."])
def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_drawn(
    tmp_path: Path, name: str, room: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    room("distvsd.looking.describe_prior", sample=lambda *values: pytest.fail("it was drawn"))
    assert main(["prior", "sample", "a", "--out", str(tmp_path / name)]) == 2
    assert "give" in capsys.readouterr().err


def test_a_build_in_a_place_that_is_no_folder_or_for_no_device_is_wrong_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    assert main(["prior", "build", str(file)]) == 2
    assert "cannot be a folder" in capsys.readouterr().err
    for device in ("nonsense", "cuda:99999999999999999999", ""):
        assert main(["prior", "build", str(tmp_path / "new"), "--device", device]) == 2
        assert "no device" in capsys.readouterr().err


def test_an_error_shows_no_control_character(
    config: str, room: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def train(config: Config, resume: str) -> int:
        raise DistvsdError("first \x1b[31m\nsecond \u202e caf\u00e9")

    room("distvsd.run.train", train=train)
    main(["train", config])
    assert capsys.readouterr().err == "distvsd: error: first \\x1b[31m\nsecond \\u202e caf\u00e9\n"


@pytest.mark.parametrize("path", ["~nosuchuser", "a" * 300, "a/" * 3000])
def test_a_plan_says_of_a_prior_at_an_impossible_path_what_is_wrong(
    config: str, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", config, f"prior.path={path}"]) == 0
    said = capsys.readouterr().out
    assert "prior's folder" in said and len(said) < 10_000


@pytest.mark.parametrize(
    "command",
    [
        *("train", "plan", "evaluate", "render", "export", "verify", "log", "doctor", ""),
        *("prior", "prior info", "prior sample", "prior build"),
    ],
)
def test_every_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    assert f"example: distvsd {command}".rstrip() in capsys.readouterr().out


@pytest.mark.parametrize("command", ["plan", "prior info", "prior sample"])
def test_the_example_of_a_help_is_understood(
    command: str, room: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    seen: list[str] = []
    room("distvsd.looking.describe_prior", sample=lambda *values: seen.append("drawn"), describe=lambda path: {})
    room("distvsd.looking.measure_prior", measure_prior=lambda path, report: seen.append("measured"))
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    _, _, example = capsys.readouterr().out.partition("example: distvsd ")
    arguments = shlex.split(example)
    assert main(arguments) == 0
    assert seen == {"plan": [], "prior info": ["measured"], "prior sample": ["drawn"]}[command]


def test_without_arguments_it_says_what_it_is_and_what_to_type_first() -> None:
    done = shell()
    assert (done.returncode, done.stderr) == (0, "")
    assert "distvsd train configs/quickstart.yaml" in done.stdout and "--help" in done.stdout
    for word in re.findall(r"configs/[a-z]+\.yaml", done.stdout):
        assert (ROOT / word).is_file()


def test_overrides_may_stand_before_and_after_options(config: str, room: Callable[..., None]) -> None:
    seen: list[tuple[Config, str]] = []

    def train(config: Config, resume: str) -> int:
        seen.append((config, resume))
        return 0

    room("distvsd.run.train", train=train)
    assert main(["train", config, "score.rank=8", "--resume", "never", "run.seed=5"]) == 0
    assert main(["train", config, "--resume", "must", "run.seed=6"]) == 0
    assert [(c.score.rank, c.run.seed, resume) for c, resume in seen] == [(8, 5, "never"), (4, 6, "must")]


@pytest.mark.parametrize("code", [0, 1, 3])
def test_the_exit_code_of_training_is_handed_on(config: str, room: Callable[..., None], code: int) -> None:
    room("distvsd.run.train", train=lambda config, resume: code)
    assert main(["train", config]) == code


@pytest.mark.parametrize(("error", "code"), [(CheckpointError, 1), (RankError, 1), (ConfigError, 2), (DistvsdError, 1)])
def test_errors_of_this_program_are_one_clean_paragraph(
    config: str, room: Callable[..., None], capsys: pytest.CaptureFixture[str], error: type[DistvsdError], code: int
) -> None:
    def train(config: Config, resume: str) -> int:
        raise error("what, where, why, and what to do next")

    room("distvsd.run.train", train=train)
    assert main(["train", config]) == code
    assert capsys.readouterr().err == "distvsd: error: what, where, why, and what to do next\n"


def test_an_error_of_another_rank_is_printed_with_the_rank(
    config: str, room: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(config: Config, resume: str) -> int:
        raise RankError("rank 2 does not answer")

    for name, value in (SECOND_OF_TWO | {"RANK": "3", "WORLD_SIZE": "4"}).items():
        monkeypatch.setenv(name, value)
    room("distvsd.run.train", train=train)
    assert main(["train", config]) == 1
    assert capsys.readouterr().err == "distvsd: error on rank 3: rank 2 does not answer\n"


def test_other_errors_keep_their_traceback(config: str, room: Callable[..., None]) -> None:
    room("distvsd.run.train", train=lambda config, resume: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main(["train", config])


@pytest.mark.parametrize("command", ["evaluate", "render", "export", "verify"])
def test_a_run_that_is_not_there_is_wrong_usage(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not a directory" in capsys.readouterr().err
    assert main([command, "x" * 300]) == 2
    assert "xxx cannot be looked at" in capsys.readouterr().err


def test_verify_prints_its_lines_and_passes_digest(
    tmp_path: Path, room: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    room("distvsd.run.contents", verify=lambda run, digest: [f"digest {digest}", "whole"])
    assert main(["verify", str(tmp_path), "--digest"]) == 0
    assert capsys.readouterr().out == "digest True\nwhole\n"


def test_a_damaged_checkpoint_ends_with_1(tmp_path: Path, room: Callable[..., None]) -> None:
    def verify(run: Path, digest: bool) -> list[str]:
        raise CheckpointError("particles/000003.safetensors does not match its manifest")

    room("distvsd.run.contents", verify=verify)
    assert main(["verify", str(tmp_path)]) == 1


def test_json_is_one_object_and_what_rooms_print_goes_elsewhere(
    tmp_path: Path, room: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def evaluate_run(run: Path) -> dict[str, Any]:
        print("a library talks")
        return {"particles": 2, "label_accuracy": {"color": 1.0}}

    room("distvsd.looking.evaluate", evaluate_run=evaluate_run)
    assert main(["evaluate", str(tmp_path), "--json"]) == 0
    written = capsys.readouterr()
    assert json.loads(written.out) == {"particles": 2, "label_accuracy": {"color": 1.0}}
    assert "a library talks" in written.err


def test_evaluate_says_what_became_of_each_particle(
    tmp_path: Path, room: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    red = {
        "id": 0,
        "prompt": "a red cube",
        "labels": {"scene": "object", "color": "red"},
        "view_accuracy": {"color": 1.0},
    }
    gone = {"id": 1, "prompt": "\x1b[31m\n", "labels": {"scene": "neither"}, "view_accuracy": {}}
    detail = [red | {"empty": False, "diverged": False}, gone | {"empty": True, "diverged": False}]
    room("distvsd.looking.evaluate", evaluate_run=lambda run: {"particles": 2, "particles_detail": detail})
    assert main(["evaluate", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "particles: 2",
        'particle 0 ("a red cube"): scene object, color red, as asked color 100%',
        'particle 1 ("\\u001b[31m\\n"): scene neither, as asked - EMPTY',
    ]


def test_render_prints_the_files_it_wrote(
    tmp_path: Path, room: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    room("distvsd.looking.render", render_run=lambda run: [run / "renders" / "sheet.png"])
    assert main(["render", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/renders/sheet.png\n"


def test_prior_sample_hands_over_any_prompt(tmp_path: Path, room: Callable[..., None]) -> None:
    seen: list[tuple[Any, ...]] = []
    room("distvsd.looking.describe_prior", sample=lambda *values: seen.append(values))
    out = tmp_path / "out.png"
    assert main(["prior", "sample", "", "--count", "2", "--seed", "7", "--out", str(out)]) == 0
    assert seen == [("shapes", "", 2, 3.0, 50, 7, out)]


def test_plan_prints_text_or_one_json_object(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config, "--nodes", "2"]) == 0
    assert "rank 1      particles 1 (1)" in capsys.readouterr().out
    assert main(["plan", config, "--nodes", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["owners"] == [{"ranks": [0, 1], "first": 0, "each": 1}]


def test_the_field_reference_needs_no_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help-config"])
    assert caught.value.code == 0
    assert "particles.nerf.log2_table_size\n" in capsys.readouterr().out


def test_doctor_names_versions_and_for_everything_missing_a_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.metadata

    installed = importlib.metadata.version

    def version(name: str) -> str:
        if name == "wandb":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"torch {installed('torch')}" in lines
    assert any(
        line.startswith("wandb not installed (optional)") and "pip install 'distvsd[wandb]'" in line for line in lines
    )
    assert any("GPU" in line for line in lines)
    assert any(line.startswith("embedded prior") for line in lines)
