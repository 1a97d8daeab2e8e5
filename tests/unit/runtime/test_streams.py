"""Output that goes nowhere: real processes whose standard streams are closed, broken or full."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distvsd.config import load_config
from tests.small_run import SMOKE, overrides

ROOT = Path(__file__).parents[3]
ONE_SHOT = {
    "dry run": ["train", str(SMOKE), "--dry-run"],
    "help": ["train", "--help"],
    "every field": ["train", "--help-config"],
}
READER_LEFT = 128 + 13  # what a shell reports of a process killed by SIGPIPE
PROGRAM = """
import os, sys
from distvsd.runtime import streams
output = streams.guard()
with open(sys.argv[1], "w") as file:
    print("caf\\u00e9 \\udcff")
    print("to error", file=sys.stderr)
    os.write(1, b"raw")
    file.write("mine")
sys.exit(streams.exit_code(0, output))
"""

CLOSED = ["2>&-", "1>&-", "0<&-", "0<&- 1>&-", "0<&- 2>&-", "1>&- 2>&-", "0<&- 1>&- 2>&-"]
# A command that writes to all three descriptors, after it has opened a file.
ALL_THREE = """
import os, sys
from distvsd.runtime import streams
streams.guard()
with open(sys.argv[1], "w") as file:
    print("printed")
    print("an error", file=sys.stderr)
    os.write(2, b"a message of a library")
    file.write(f"{file.fileno()} {sys.stdin.read()!r}")
import faulthandler
faulthandler.enable()
sys.stdout.flush()
inherited = [not os.get_inheritable(descriptor) for descriptor in (0, 1, 2)]
sys.exit(sum(inherited))
"""


@pytest.fixture
def broken() -> Iterator[int]:
    """The writing end of a pipe whose reading end is closed."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.fixture
def full() -> Iterator[int]:
    """A file on a disk without space."""
    handle = os.open("/dev/full", os.O_WRONLY)
    yield handle
    os.close(handle)


def run(arguments: list[str], stdout: int = subprocess.PIPE, **more: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "distvsd", *arguments]
    return subprocess.run(command, **{"stdout": stdout, "stderr": subprocess.PIPE, "cwd": ROOT, "check": False} | more)


@pytest.mark.parametrize("buffer", ["1", ""])
@pytest.mark.parametrize("command", ONE_SHOT)
def test_a_reader_that_left_ends_a_command_quietly(command: str, buffer: str, broken: int) -> None:
    done = run(ONE_SHOT[command], broken, env=os.environ | {"PYTHONUNBUFFERED": buffer})
    assert (done.returncode, done.stderr) == (READER_LEFT, b"")


@pytest.mark.parametrize("buffer", ["1", ""])
@pytest.mark.parametrize("command", ONE_SHOT)
def test_a_full_disk_for_the_output_is_one_message(command: str, buffer: str, full: int) -> None:
    done = run(ONE_SHOT[command], full, env=os.environ | {"PYTHONUNBUFFERED": buffer})
    (line,) = done.stderr.decode().splitlines()
    assert done.returncode == 1
    assert line.startswith("distvsd: error: standard output") and "No space left" in line


def test_a_mistake_keeps_its_code_when_no_stream_can_be_written(tmp_path: Path, full: int) -> None:
    done = run(["train", str(tmp_path / "nowhere.yaml")], full)
    assert done.returncode == 2 and b"nowhere.yaml" in done.stderr and len(done.stderr.splitlines()) == 1
    assert run(["train", str(tmp_path / "nowhere.yaml")], full, stderr=full).returncode == 2


def test_letters_that_a_terminal_does_not_have_are_escaped_and_a_configuration_is_utf_8(tmp_path: Path) -> None:
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "file")]
    done = subprocess.run(command, stdout=subprocess.PIPE, cwd=ROOT, env=ascii_only, check=True)
    assert b"caf\\xe9 \\udcff\n" in done.stdout
    path = tmp_path / "resolved.yaml"
    path.write_bytes(run(["train", str(SMOKE), "prompt=caf\u00e9", "--dry-run"], env=ascii_only).stdout)
    assert load_config(path).prompts[0] == "caf\u00e9"


def test_a_training_goes_on_when_nobody_reads_what_it_prints(tmp_path: Path, prior: Path, broken: int) -> None:
    """Nothing that the program or its libraries print can be written, and the run still finishes."""
    arguments = overrides(tmp_path / "run", prior, **{"particles.count": 1, "schedule.rounds": 2, "log.every": 1})
    assert run(["train", str(SMOKE), *arguments], broken, stderr=broken).returncode == 0
    assert json.loads((tmp_path / "run/STATUS.json").read_text())["state"] == "done"
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2


def shell(closed: str, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/sh", "-c", f'"$@" {closed}', "sh", sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("closed", CLOSED)
def test_no_file_gets_the_number_of_a_closed_stream_and_its_messages(tmp_path: Path, closed: str) -> None:
    file = tmp_path / "file"
    done = shell(closed, "-c", ALL_THREE, str(file))
    assert (done.returncode, done.stdout) == (0, "" if "1>&-" in closed else "printed\n"), done.stderr
    assert done.stderr == ("" if "2>&-" in closed else "an error\na message of a library")
    number, read = file.read_text().split()
    assert int(number) > 2 and read == "''"


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_the_command_line_starts_with_streams_closed(closed: str) -> None:
    done = shell(closed, "-m", "distvsd", "train", str(SMOKE), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and ("prompt" in done.stdout) == ("1>&-" not in closed)


def test_a_plan_is_printed_without_the_other_streams() -> None:
    done = shell("0<&- 2>&-", "-m", "distvsd", "plan", str(SMOKE), "--json")
    assert done.returncode == 0 and json.loads(done.stdout)


def test_a_mistake_has_its_exit_code_where_it_cannot_be_said() -> None:
    assert shell("2>&-", "-m", "distvsd", "train", str(SMOKE), "particles.cuont=3").returncode == 2
