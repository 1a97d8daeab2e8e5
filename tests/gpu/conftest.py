"""Tests that need CUDA. Without it they are skipped, and the summary reports their number.

They run in a separate process (`DISTVSD_TEST_GPU=1 pytest tests/gpu`). tests/ranks forks ranks, and a process that has
computed gradients on a GPU cannot be forked, because autograd's device threads do not survive a fork.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from _pytest.terminal import TerminalReporter

HERE = Path(__file__).parent
REASON = "no CUDA; on a machine with a GPU: DISTVSD_TEST_GPU=1 pytest tests/gpu"
_skipped: list[str] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.skip(reason=REASON))
            _skipped.append(item.nodeid)


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    if _skipped:
        terminalreporter.write_line(f"gpu tests skipped: {len(_skipped)} ({REASON})")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")
