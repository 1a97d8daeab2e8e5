"""Every line of metrics.jsonl is whole JSON, and a resumed run has each round once."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import pytest

from distvsd.errors import RunError
from distvsd.runtime.metrics import JsonLines


def rounds(path: Path) -> list[int]:
    return [json.loads(line)["round"] for line in path.read_text().splitlines()]


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with JsonLines(path) as metrics:
        for round in range(3):
            metrics.append({"round": round, "score_loss": 0.5})
            assert rounds(path) == list(range(round + 1))
            assert metrics.bytes == path.stat().st_size


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with JsonLines(path) as metrics:
        metrics.append({"round": 1, "loss": math.nan, "nested": {"up": [math.inf, (1.0, -math.inf)]}, "text": "NaN"})
    assert json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name)) == {
        "round": 1,
        "loss": None,
        "nested": {"up": [None, [1.0, None]]},
        "text": "NaN",
    }


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes"])
def test_what_is_not_json_is_refused_and_writes_nothing(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "metrics.jsonl"
    with JsonLines(path) as metrics, pytest.raises(RunError, match="not JSON serializable"):
        metrics.append({"round": 1, "value": value})
    assert path.read_bytes() == b""


@pytest.mark.guarantee("G29")
def test_a_resumed_run_has_no_round_twice_and_none_missing(tmp_path: Path) -> None:
    """A file cut to the length in the checkpoint has every round once, also where it ended in half a line."""
    path = tmp_path / "metrics.jsonl"
    with JsonLines(path) as metrics:
        for round in range(10):
            metrics.append({"round": round})
        saved = metrics.bytes
        for round in range(10, 15):
            metrics.append({"round": round})
    with path.open("ab") as stream:
        stream.write(b'{"round": 1')  # a power cut in the middle of a line
    with JsonLines(path, keep_bytes=saved) as metrics:
        assert metrics.bytes == saved
        for round in range(10, 20):
            metrics.append({"round": round})
    assert rounds(path) == list(range(20))


def test_a_fresh_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"round": 7}\n')
    JsonLines(path, keep_bytes=0).close()
    assert path.read_bytes() == b""


def test_half_a_line_at_the_end_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "health.jsonl"
    path.write_text('{"round": 7}\n{"rou')
    with JsonLines(path) as health:
        health.append({"round": 8})
    assert rounds(path) == [7, 8]


def test_lost_lines_are_a_warning_and_not_filled_with_anything(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"round": 0}\n')
    with caplog.at_level(logging.WARNING), JsonLines(path, keep_bytes=500) as metrics:
        metrics.append({"round": 50})
    assert rounds(path) == [0, 50] and "lines were lost" in caplog.text


def test_a_full_disk_drops_lines_and_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    write = os.pwrite
    with JsonLines(path) as metrics, caplog.at_level(logging.WARNING):
        metrics.append({"round": 0})
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", lambda handle, data, offset: write(handle, data[:3], offset))
            metrics.append({"round": 1})
            metrics.append({"round": 2})
        metrics.append({"round": 3})
        assert metrics.dropped == 2
    assert rounds(path) == [0, 3] and len(caplog.messages) == 1


def test_a_path_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is a folder"):
        JsonLines(tmp_path)


def test_what_is_left_of_a_line_is_cut_off_however_long_it_is(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"round": 1}\n' + b"x" * (5 * 2**20))
    with JsonLines(path) as metrics:
        metrics.append({"round": 2})
    assert rounds(path) == [1, 2]
    path.write_bytes(b"x" * (3 * 2**20))
    with JsonLines(path) as metrics:
        metrics.append({"round": 3})
    assert rounds(path) == [3]
