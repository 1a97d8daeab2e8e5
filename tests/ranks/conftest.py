"""Counts the runs on several ranks. The suite fails if no run had a second rank, because it would then test nothing."""

from __future__ import annotations

import pytest
from _pytest.terminal import TerminalReporter

from distvsd.testing.ranks import multi_rank_runs

_called: list[str] = []


def pytest_runtest_call(item: pytest.Item) -> None:
    _called.append(item.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if _called and multi_rank_runs() == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    runs = multi_rank_runs()
    complaint = "; no test in tests/ranks had a second rank: failed" if _called and runs == 0 else ""
    terminalreporter.write_line(f"multi-rank runs: {runs}{complaint}")
