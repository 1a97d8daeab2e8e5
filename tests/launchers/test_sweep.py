"""wandb's agent makes a command line that trains from each file of launch/sweep.

The agent is the real one, without its server. The test passes it a trial as the server would send it.
"""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from distvsd.config import load_config, to_yaml
from distvsd.errors import ConfigError
from distvsd.run.train import train
from distvsd.testing.pipelines import tiny_pipeline
from distvsd.testing.ranks import run_ranks
from tests.small_run import TINY

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "launch/sweep").glob("*.yaml"))
BASE = "configs/quickstart.yaml"
# Every sweep must vary these parameters.
SUBJECTS = {"prior.guidance_scale", "particles.count", "score.steps_per_round"}

sweep_utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")


def sweep(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def draw(parameter: dict[str, Any], source: random.Random) -> Any:
    """A value as the server draws it, for the distributions that the files use."""
    low, high = parameter.get("min"), parameter.get("max")
    match parameter.get("distribution"):
        case None:
            return source.choice(parameter["values"])
        case "uniform":
            return source.uniform(low, high)
        case "int_uniform":
            return source.randint(low, high)
        case "log_uniform_values":
            return low * (high / low) ** source.random()
        case "q_log_uniform_values":
            return round(low * (high / low) ** source.random() / parameter["q"]) * parameter["q"]
    raise AssertionError(f"distribution {parameter['distribution']!r} is missing here; add how the server draws it")


def trial(path: Path, seed: int) -> dict[str, Any]:
    """What the server sends to an agent for one trial of a sweep."""
    source = random.Random(seed)
    values = {name: {"value": draw(parameter, source)} for name, parameter in sweep(path)["parameters"].items()}
    return {"type": "run", "run_id": f"trial{seed}", "program": sweep(path)["program"], "args": values}


@pytest.mark.guarantee("G28")
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
def test_every_sample_of_a_sweep_is_a_legal_configuration(path: Path) -> None:
    """The arguments that wandb's agent makes from 30 samples set exactly the drawn values."""
    content = sweep(path)
    assert content["program"] == "launch/sweep/trial.sh" and content["metric"]["name"] == "evaluation/label_accuracy"
    assert content["parameters"].keys() >= SUBJECTS
    fixed = [text for text in content["command"] if "=" in text]
    for seed in range(30):
        sent = trial(path, seed)
        arguments = sweep_utils.create_sweep_command_args(sent)["args_no_hyphens"]
        config = load_config(ROOT / BASE, [*fixed, *arguments])
        assert config.log.wandb == "online"
        for name, value in ((name, entry["value"]) for name, entry in sent["args"].items()):
            found: Any = config
            for part in name.split("."):
                found = getattr(found, part)
            assert (found.at(10**6) if hasattr(found, "at") else found) == pytest.approx(value), name


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the quickstart configuration with a tiny prior and tiny particles."""
    folder = tmp_path_factory.mktemp("base")
    tiny_pipeline(folder / "prior")
    small = {
        "prior.path": folder / "prior",
        **TINY,
        "schedule.rounds": 4,
        "checkpoint.every": 2,
        "log.every": 1,
    }
    config = load_config(ROOT / BASE, [f"{key}={value}" for key, value in small.items()])
    (folder / "base.yaml").write_text(to_yaml(config))
    return folder / "base.yaml"


def start_trial(path: Path, seed: int, base: Path, home: Path, monkeypatch: pytest.MonkeyPatch, **more: str) -> Any:
    """Starts a trial on 2 CPU ranks through the agent. Returns its process. The agent changes the environment of the
    test."""
    from wandb.wandb_agent import Agent

    launchers_own = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "ACCELERATE_", "TORCHELASTIC_", "WANDB_")
    for name in [name for name in os.environ if name.startswith(launchers_own)]:
        monkeypatch.delenv(name)
    environment = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(home / "hf"),
        "ACCELERATE_USE_CPU": "true",
        "DISTVSD_RANKS": "2",
        "DISTVSD_SWEEP_DIR": str(home / "sweep"),
        "WANDB_DIR": str(home),
        "WANDB_MODE": "offline",
        "WANDB_SWEEP_ID": "sweep9",
        "WANDB_RUN_ID": "",
        "WANDB_SWEEP_PARAM_PATH": "",
        "WANDB_PROJECT": "castles",
    } | more
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    agent = Agent(api=None, queue=None, sweep_id="sweep9")
    command = copy.copy(sweep(path)["command"])
    command[command.index(BASE)] = str(base)
    agent._sweep_command = command
    sent = trial(path, seed)
    sent["args"]["particles.count"]["value"] = 3
    agent._command_run(sent)
    return agent._run_processes[f"trial{seed}"]


@pytest.mark.guarantee("G28")
@pytest.mark.skipif(torch.cuda.is_available(), reason="these tests train on two CPU ranks")
def test_a_trial_trains_on_two_ranks_and_is_one_run_in_wandb(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that wandb's agent makes from a sweep file trains on 2 ranks with the drawn values. The training and
    its evaluation are logged in the one run that the agent chose."""
    path = ROOT / "launch/sweep/bayes.yaml"
    process = start_trial(path, 7, base, tmp_path, monkeypatch, DISTVSD_LAUNCHER="torchrun")
    assert process.wait(timeout=300) == 0
    run = tmp_path / "sweep/sweep9/trial7"
    assert json.loads((run / "STATUS.json").read_text())["state"] == "done"
    manifest = json.loads((run / "checkpoints/step-00000004/manifest.json").read_text())
    assert manifest["world_size"] == 2
    config, drawn = load_config(run / "config.yaml"), trial(path, 7)["args"]
    assert config.prior.guidance_scale == pytest.approx(drawn["prior.guidance_scale"]["value"])
    assert config.score.steps_per_round == drawn["score.steps_per_round"]["value"]
    assert json.loads((run / "wandb.json").read_text()) == {"run_id": "trial7"}
    # One for the training, by rank 0 only, and one for the evaluation after it.
    offline = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(offline) == 2 and {file.name for file in offline} == {"run-trial7.wandb"}
    assert b"label_accuracy" in offline[1].read_bytes()
    assert b"contact-sheet" in offline[0].read_bytes() and b"score_loss" in offline[0].read_bytes()


@pytest.mark.guarantee("G28")
@pytest.mark.skipif(torch.cuda.is_available(), reason="these tests train on two CPU ranks")
def test_a_trial_that_is_stopped_ends_as_preempted_and_goes_on_when_queued_again(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent's SIGTERM to a trial reaches the ranks, and they save. When the trial is started again, it continues
    from that checkpoint as the same run in wandb."""
    path = ROOT / "launch/sweep/grid.yaml"
    slow = {"DISTVSD_FAULTS": "sleep@round:ms=500"}
    process = start_trial(path, 3, base, tmp_path, monkeypatch, DISTVSD_LAUNCHER="accelerate", **slow)
    run = tmp_path / "sweep/sweep9/trial3"
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline, "the trial did not finish its first round"
        time.sleep(0.05)
    os.kill(process._popen.pid, signal.SIGTERM)
    assert process.wait(timeout=120) == 3
    status = json.loads((run / "STATUS.json").read_text())
    assert status["state"] == "preempted" and 0 < status["round"] < 4
    monkeypatch.delenv("DISTVSD_FAULTS")
    again = start_trial(path, 3, base, tmp_path, monkeypatch, DISTVSD_LAUNCHER="accelerate")
    assert again.wait(timeout=300) == 0
    assert json.loads((run / "STATUS.json").read_text())["state"] == "done"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3, 4]
    # Two trainings and one evaluation.
    offline = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(offline) == 3 and {file.name for file in offline} == {"run-trial3.wandb"}


@pytest.mark.parametrize(("is_told", "code"), [(True, 3), (False, 1)])
def test_a_trial_that_never_began_counts_as_preempted_only_if_it_was_told_to_stop(
    tmp_path: Path, is_told: bool, code: int
) -> None:
    (tmp_path / "launcher").write_text(
        f"trap 'exit 1' TERM\ntouch {tmp_path}/began\n{'sleep 20 & wait' * is_told}\nexit 1"
    )
    environment = {"DISTVSD_LAUNCHER": f"sh {tmp_path / 'launcher'}", "DISTVSD_SWEEP_DIR": str(tmp_path / "sweep")}
    trial = subprocess.Popen(
        ["sh", "launch/sweep/trial.sh", "config.yaml"], cwd=ROOT, env=os.environ | environment | {"DISTVSD_RANKS": "1"}
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "began").exists():
        assert time.monotonic() < deadline, "the launcher was not started"
        time.sleep(0.01)
    if is_told:
        trial.terminate()
    assert trial.wait(60) == code


def test_a_trial_without_a_configuration_says_how_it_is_called() -> None:
    done = subprocess.run(["sh", "launch/sweep/trial.sh"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "usage: sh launch/sweep/trial.sh CONFIG" in done.stderr


@pytest.mark.guarantee("G28")
def test_ranks_with_different_configurations_are_refused_with_the_key(tmp_path: Path, base: Path) -> None:
    """All ranks compare their whole configurations before they create anything. The error names the key and both values
    on every rank."""

    def start(world: Any) -> None:
        scale = 3 if world.rank == 0 else 7.5
        config = load_config(base, [f"run.dir={tmp_path / 'run'}", f"prior.guidance_scale={scale}"])
        with pytest.raises(ConfigError, match=r"ranks 0 and 1 .*prior\.guidance_scale is 3 and 7\.5;"):
            train(config)

    run_ranks(start, 2)
    assert not (tmp_path / "run").exists()
