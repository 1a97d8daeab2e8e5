"""Names of processes, and which processes can be judged from here."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from distvsd.runtime.process import is_from_here, may_live, process_name, process_state, system_id

HERE, PID = socket.gethostname(), os.getpid()
START = process_state(PID)[1]


def test_a_name_says_host_pid_start_and_system() -> None:
    assert process_name() == f"{HERE}:{PID}:{START}:{system_id()}".rstrip(":")
    assert is_from_here(process_name()) and may_live(process_name())


@pytest.mark.skipif(not Path("/proc/self/ns/pid").is_symlink(), reason="this system does not tell PID namespaces")
def test_a_system_is_a_boot_and_a_pid_namespace() -> None:
    assert re.fullmatch(r"([0-9a-f-]{36}\.)?\d+", system_id())
    told = subprocess.run(["readlink", "/proc/self/ns/pid"], capture_output=True, text=True, check=True).stdout
    assert told.strip() == f"pid:[{system_id().rpartition('.')[2]}]"


def test_other_processes_here_are_in_the_same_system() -> None:
    code = "from distvsd.runtime.process import process_name; print(process_name())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    name = done.stdout.strip()
    assert name.rpartition(":")[2] == process_name().rpartition(":")[2]
    assert is_from_here(name) and not may_live(name), "it has ended"


@pytest.mark.parametrize(
    "name",
    [
        f"elsewhere:{PID}",
        f"elsewhere:{PID}:{START}:{system_id()}",
        f"{HERE}:{2**22 + 1}:1:another-boot.4026531836",
        f"{HERE}:{2**22 + 1}::{system_id()}0",
        "somebody's notes",
        f"{HERE}:99999999999999999999",
    ],
)
def test_who_cannot_be_seen_from_here_may_live(name: str) -> None:
    assert not is_from_here(name) and may_live(name)


@pytest.mark.parametrize("name", [f"{HERE}:{PID}", f"{HERE}:{PID}:{START}", f"{HERE}:{PID}::{system_id()}"])
def test_what_a_name_does_not_say_is_not_held_against_it(name: str) -> None:
    assert is_from_here(name) and may_live(name)


@pytest.mark.parametrize("name", [f"{HERE}:{2**22 + 1}", f"{HERE}:{PID}:1", f"{HERE}:{PID}:1:{system_id()}"])
def test_who_is_gone_or_younger_than_the_name_does_not_live(name: str) -> None:
    assert is_from_here(name) and not may_live(name)
