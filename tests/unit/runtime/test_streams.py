"""Commands that are started with standard input, output or error closed, as some schedulers and `2>&-` do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SMOKE = str(ROOT / "configs/smoke.yaml")
CLOSED = ["2>&-", "1>&-", "0<&-", "0<&- 1>&-", "0<&- 2>&-", "1>&- 2>&-", "0<&- 1>&- 2>&-"]
# A command that writes to all three descriptors, after it has opened a file.
PROGRAM = """
import os, sys
from distvsd.runtime.streams import open_standard_streams
open_standard_streams()
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
    done = shell(closed, "-c", PROGRAM, str(file))
    assert (done.returncode, done.stdout) == (0, "" if "1>&-" in closed else "printed\n"), done.stderr
    assert done.stderr == ("" if "2>&-" in closed else "an error\na message of a library")
    number, read = file.read_text().split()
    assert int(number) > 2 and read == "''"


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_the_command_line_starts_with_streams_closed(closed: str) -> None:
    done = shell(closed, "-m", "distvsd", "train", SMOKE, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and ("prompt" in done.stdout) == ("1>&-" not in closed)


def test_a_plan_is_printed_without_the_other_streams() -> None:
    done = shell("0<&- 2>&-", "-m", "distvsd", "plan", SMOKE, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)


def test_a_mistake_has_its_exit_code_where_it_cannot_be_said() -> None:
    assert shell("2>&-", "-m", "distvsd", "train", SMOKE, "particles.cuont=3").returncode == 2
