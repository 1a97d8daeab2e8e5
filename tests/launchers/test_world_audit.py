"""Processes of one launcher that do not form one world are refused, and the error names the right command.

Each test starts a real launcher, which takes seconds. tests/unit/parallel tests what the environment alone shows, and
test_end_to_end.py tests worlds that train.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = str(Path(__file__).with_name("show_world.py"))
ACCELERATE = ["-m", "accelerate.commands.launch"]
GPU_PROCESSES = [*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the same line starts a real world")


def launch(folder: Path, command: list[str], **environment: str) -> tuple[int, list[dict[str, Any]]]:
    """The launcher's exit code and what each process found."""
    launchers_own = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "ACCELERATE_", "TORCHELASTIC_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(launchers_own)}
    # An empty HF_HOME, so that the user's accelerate configuration does not affect the test.
    environment = inherited | {"OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf")} | environment
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    found = folder / "found"
    found.mkdir()
    line = [sys.executable, *command, SCRIPT, str(found)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)
    results = [json.loads(path.read_text()) for path in found.glob("*.json")]
    assert results, f"no process wrote anything:\n{done.stderr}"
    return done.returncode, sorted(results, key=lambda result: result.get("rank", 0))


@pytest.mark.guarantee("G31")
@cpu_only
def test_accelerate_for_gpus_without_gpus_is_refused_by_both_processes(tmp_path: Path) -> None:
    """Two processes that would each train alone are both refused. The error names the command that makes them one
    world."""
    code, results = launch(tmp_path, GPU_PROCESSES)
    assert code != 0 and len(results) == 2
    for result in results:
        assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2" in result["error"]


@pytest.mark.guarantee("G31")
def test_a_multi_cpu_configuration_that_starts_one_process_is_refused(tmp_path: Path) -> None:
    """If a launcher starts one process although two were requested, the process refuses to train."""
    config = tmp_path / "accelerate.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_machines: 1\nnum_processes: 2\n"
        "machine_rank: 0\nmixed_precision: 'no'\nuse_cpu: true\n"
    )
    code, results = launch(tmp_path, [*ACCELERATE, "--config_file", str(config)])
    assert code != 0 and len(results) == 1
    assert "started this one alone" in results[0]["error"]
