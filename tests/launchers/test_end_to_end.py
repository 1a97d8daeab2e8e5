"""Whole trainings through real launchers: the user's command, the files afterwards and the exit code.

The commands are those of launch/README.md with the settings of a small run. Each launch takes seconds per rank for
imports, so each test checks many results of one launch. tests/ranks has more cases.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from distvsd.config import load_config
from distvsd.run.contents import verify as verify_run
from distvsd.run.train import train
from tests.small_run import overrides

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "configs" / "smoke.yaml"
ALONE, TORCHRUN, NODES, ACCELERATE = (
    "distvsd train",
    "torchrun --standalone",
    "torchrun --nnodes",
    "ACCELERATE_USE_CPU=true accelerate launch",
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these tests train on two CPU ranks")


def settings(run: Path, prior: Path, **changes: Any) -> list[str]:
    return overrides(run, prior, **{"log.every": 2} | changes)


@dataclass(frozen=True)
class Launched:
    code: int
    output: str

    def count(self, text: str) -> int:
        return self.output.count(text)


def environment(**more: str) -> dict[str, str]:
    """The environment of a user's shell: this Python's commands are on the path, and no variables of a launcher are
    set."""
    launchers_own = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "ACCELERATE_", "TORCHELASTIC_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(launchers_own)}
    path = os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", "")])
    return inherited | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def documented() -> list[str]:
    """The lines of launch/README.md that are marked as tested."""
    blocks = re.findall(r"^```sh test\n(.*?)^```", (ROOT / "launch/README.md").read_text(), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


def command(beginning: str, settings: list[str]) -> str:
    """The documented line with this beginning, with the settings appended."""
    (line,) = (line for line in documented() if line.startswith(beginning))
    return f"{line} {shlex.join(settings)}"


def start(line: str, home: Path) -> subprocess.Popen[str]:
    # An empty HF_HOME, so that the user's accelerate configuration does not affect the test.
    return subprocess.Popen(
        ["/bin/sh", "-c", line],
        env=environment(HF_HOME=str(home / "hf")),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def launch(*lines: str, home: Path) -> Launched:
    """Runs the lines in parallel, as on several machines. Returns the largest exit code and all output."""
    processes = [start(line, home) for line in lines]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return Launched(max(process.returncode for process in processes), "".join(outputs))


def digest(run: Path) -> list[str]:
    return verify_run(run, digest=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, prior: Path) -> list[str]:
    """The digest of the same run, trained in this process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert train(load_config(SMOKE, settings(run, prior))) == 0
    return digest(run)


def test_every_documented_line_is_one_of_those_launched_here() -> None:
    tested = (ALONE, TORCHRUN, NODES, ACCELERATE)
    assert len(documented()) == len(tested)
    for beginning in tested:
        assert command(beginning, []).count("configs/smoke.yaml run.dir=runs/") == 1


def test_the_command_alone_trains_without_a_group(tmp_path: Path, prior: Path, alone: list[str]) -> None:
    run = tmp_path / "run"
    done = launch(command(ALONE, settings(run, prior)), home=tmp_path)
    assert done.code == 0, done.output
    is_a_complete_run(run, world_size=1)
    assert digest(run) == alone


def test_torchrun_trains_one_run_on_two_ranks_and_a_second_start_finds_it_done(
    tmp_path: Path, prior: Path, alone: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    first = launch(command(TORCHRUN, settings(run, prior)), home=tmp_path)
    assert first.code == 0, first.output
    is_a_complete_run(run)
    assert digest(run) == alone
    # Only one of the two ranks prints.
    assert [first.count(f"round {number}/4") for number in (2, 4)] == [1, 1]
    assert "Traceback" not in first.output

    metrics = (run / "metrics.jsonl").read_text()
    assert train(load_config(SMOKE, settings(run, prior))) == 0
    assert "round " not in capfd.readouterr().err
    assert json.loads((run / "STATUS.json").read_text())["state"] == "done"
    assert (run / "metrics.jsonl").read_text() == metrics and digest(run) == alone


def test_accelerate_goes_on_where_one_process_stopped_and_gives_the_same_particles(
    tmp_path: Path, prior: Path, alone: list[str]
) -> None:
    run = tmp_path / "run"
    assert train(load_config(SMOKE, settings(run, prior, **{"schedule.rounds": 2}))) == 0
    # A longer schedule changes the configuration, so the resume needs --resume must.
    line = command(ACCELERATE, settings(run, prior)) + " --resume must"
    done = launch(line, home=tmp_path)
    assert done.code == 0, done.output
    is_a_complete_run(run)
    assert digest(run) == alone
    assert done.count("round 4/4") == 1 and done.count("round 2/4") == 0


def test_torchrun_on_two_machines_makes_one_world(tmp_path: Path, prior: Path, alone: list[str]) -> None:
    """Runs the same line twice on this machine: two agents with one rank each and one rendezvous address."""
    run = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    line = command(NODES, settings(run, prior)).replace("HOST:29500", address)
    done = launch(line, line, home=tmp_path)
    assert done.code == 0, done.output
    is_a_complete_run(run)
    assert digest(run) == alone
    assert done.count("round 4/4") == 1


def test_a_wrong_configuration_ends_with_2_and_is_told_once(tmp_path: Path, prior: Path) -> None:
    """Each process exits with 2. torchrun itself exits with 1 after any failure and prints their exit codes."""
    line = command(TORCHRUN, settings(tmp_path / "run", prior, **{"particles.cuont": 3}))
    done = launch(line, home=tmp_path)
    assert done.code != 0
    assert done.count("did you mean particles.count?") == 1
    assert re.search(r"exitcode\s*:\s*2\b", done.output)
    assert not (tmp_path / "run").exists()


def test_the_demo_makes_pictures_and_meshes_of_two_prompts_beside_a_finished_one(tmp_path: Path, prior: Path) -> None:
    small = [setting for setting in settings(tmp_path, prior) if not setting.startswith("run.dir")]
    small += ["particles.mesh.grid=6", "particles.mesh.threshold=1"]
    small += [f"stages.{stage}.schedule.rounds=1" for stage in (1, 2, 3)]
    finished = tmp_path / "demo/an-object/stages/3-texture/exports/particles.glb"
    finished.parent.mkdir(parents=True)
    finished.write_text("{}")
    done = launch(f"sh launch/demo.sh {shlex.quote(str(tmp_path / 'demo'))} {shlex.join(small)}", home=tmp_path)
    assert done.code == 0, done.output
    assert finished.read_text() == "{}"
    for name in ("a-red-cube", "an-object"):
        texture = tmp_path / "demo-2" / name / "stages/3-texture"
        assert json.loads((texture / "evaluation.json").read_text())["particles"] == 3
        for made in (texture / "renders/contact-sheet.png", texture / "exports/particles.glb"):
            assert made.is_file() and str(made) in done.output.split("Done in")[1]


def test_the_demo_without_a_folder_says_how_it_is_called(tmp_path: Path) -> None:
    done = launch("sh launch/demo.sh", home=tmp_path)
    assert done.code == 2 and "usage: sh launch/demo.sh DIR" in done.output


def is_a_complete_run(run: Path, world_size: int = 2) -> None:
    """Asserts that the folder contains exactly the files of a run of 4 rounds and 3 particles."""
    files = sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())
    checkpoint = [
        "manifest.json",
        *(f"particles/{number:06d}.safetensors" for number in range(3)),
        "score/adapter_config.json",
        *(f"score/{name}.safetensors" for name in ("adapter_model", "camera", "optimizer", "replay")),
    ]
    assert files == sorted(
        ["STATUS.json", "config.yaml", "health.jsonl", "metrics.jsonl", "renders/contact-sheet.png"]
        + [f"checkpoints/step-{step:08d}/{name}" for step in (2, 4) for name in checkpoint]
    )
    status = json.loads((run / "STATUS.json").read_text())
    assert (status["state"], status["round"], status["rounds"]) == ("done", 4, 4)
    newest = run / "checkpoints/step-00000004"
    assert json.loads((newest / "manifest.json").read_text())["world_size"] == world_size
    with safe_open(newest / "particles/000002.safetensors", "pt") as particle:
        assert int(particle.get_tensor("adam_step")) == 4
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["round"], line["healthy"]) for line in lines] == [(2, 3), (4, 3)]
    assert load_config(run / "config.yaml").particles.count == 3
    with Image.open(run / "renders/contact-sheet.png") as sheet:
        assert sheet.width > 8 * 16
