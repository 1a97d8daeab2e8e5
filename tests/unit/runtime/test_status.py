"""STATUS.json has the state of a run and can be read at any moment."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from distvsd.errors import RunError
from distvsd.runtime.status import read_status, write_status


@pytest.mark.parametrize("state", ["running", "done", "preempted", "failed"])
def test_a_status_holds_state_rounds_time_and_message(tmp_path: Path, state: Any) -> None:
    path = tmp_path / "STATUS.json"
    before = time.time()
    write_status(path, state, 40, 100, "why")
    record = json.loads(path.read_text())
    assert before <= record.pop("time") <= time.time()
    assert record == {"state": state, "round": 40, "rounds": 100, "message": "why"}
    read = read_status(path)
    assert read is not None and read["state"] == state
    assert [entry.name for entry in tmp_path.iterdir()] == ["STATUS.json"]


def test_a_run_without_a_status_has_none(tmp_path: Path) -> None:
    assert read_status(tmp_path / "STATUS.json") is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": "asleep"}', "\0\0"])
def test_a_file_that_is_no_status_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "STATUS.json"
    path.write_text(text)
    with pytest.raises(RunError, match=r"STATUS\.json.*delete it"):
        read_status(path)


def test_an_unknown_state_is_refused(tmp_path: Path) -> None:
    state: Any = "asleep"
    with pytest.raises(RunError, match="running, done, preempted, failed"):
        write_status(tmp_path / "STATUS.json", state, 0, 1)
