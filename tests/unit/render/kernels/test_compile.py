"""The kernels are compiled to machine code for a GPU here. They are not run on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[3]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """The memory instructions of each kernel."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *environment.get("PYTHONPATH", "").split(os.pathsep)])
    command = [sys.executable, str(HERE / "compiled.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, int]] = json.loads(done.stdout)
    return found


def number(instructions: dict[str, int], start: str) -> int:
    return sum(count for name, count in instructions.items() if name.startswith(start))


def test_every_kernel_compiles_for_a_gpu(compiled: dict[str, dict[str, int]]) -> None:
    assert len(compiled) == 10 and all(compiled.values())


def test_the_features_of_an_entry_are_read_and_added_as_one(compiled: dict[str, dict[str, int]]) -> None:
    """256 points on 128 threads: two points, eight corners each, and not 32 single accesses."""
    assert number(compiled["read"], "ld.global.v2") == 16
    assert number(compiled["add, tables only"], "atom.global.gpu.relaxed.add.v2") == 16


def test_nothing_but_the_backward_pass_of_the_grid_is_atomic(compiled: dict[str, dict[str, int]]) -> None:
    with_atomics = {name for name, found in compiled.items() if number(found, "atom") + number(found, "red")}
    assert with_atomics == {name for name in compiled if name.startswith("add")}
