"""One thread and no GPU in the parent, because tests fork ranks; Triton's interpreter in its place; and the record of
which test proves which guarantee.

A forked child of a process with busy OpenMP threads can deadlock, and autograd's device threads do not survive a fork:
the tests of tests/gpu run by themselves, with DISTVSD_TEST_GPU=1.

`@pytest.mark.guarantee("G5")` marks a test that proves a guarantee; its docstring is the promise, and the fixture
`figure` reports what it measured. `pytest --guarantees FILE` writes the outcomes, `python -m tests.guarantees FILE`
makes docs/guarantees.md of them.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ.get("DISTVSD_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when Triton is first imported by whatever test

import pytest
import torch
from _pytest.terminal import TerminalReporter

torch.set_num_threads(1)

_records = pytest.StashKey[dict[str, dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--guarantees",
        metavar="FILE",
        default=None,
        help="write which guarantee was proved by which test, with what outcome and figures, as JSON",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "guarantee(*ids): the test proves these guarantees of docs/guarantees.md")
    config.stash[_records] = {}


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Reports a measured number, in words with its unit: `figure("12 kills, 0 unreadable")`."""

    def report(text: str) -> None:
        request.node.user_properties.append(("figure", text))

    return report


@pytest.fixture(scope="session")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the smallest random pipeline in the layout of the embedded prior; not to be written to."""
    from distvsd.run.train import train
    from distvsd.testing.pipelines import tiny_pipeline
    from tests.small_run import small_config

    folder = tiny_pipeline(tmp_path_factory.mktemp("prior"), "shapes", "v_prediction", 0, levels=1)
    # Whatever a training imports late is imported here, once, and not by each rank that a test forks.
    train(small_config(tmp_path_factory.mktemp("first") / "run", folder, **{"schedule.rounds": 1}))
    return folder


@pytest.fixture(scope="session")
def deepspeed() -> None:
    """Imports what DeepSpeed imports in its first use, seconds of it, here and not in each forked rank; skips without
    it."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed")
    with contextlib.suppress(ImportError):
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - it compiles kernels, which takes seconds


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: pytest.TestReport = yield
    ids = [str(given) for mark in item.iter_markers("guarantee") for given in mark.args]
    if ids:
        records = item.config.stash[_records]
        before = records.get(item.nodeid, {"outcome": "passed"})["outcome"]
        records[item.nodeid] = {
            "guarantees": sorted(set(ids)),
            "promise": inspect.getdoc(getattr(item, "function", None)) or "",
            "outcome": before if report.outcome == "passed" else report.outcome,
            "figures": [text for kind, text in item.user_properties if kind == "figure"],
        }
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--guarantees")
    if path is not None:
        Path(path).write_text(json.dumps(session.config.stash[_records], indent=1) + "\n", encoding="utf-8")


def pytest_terminal_summary(terminalreporter: TerminalReporter, config: pytest.Config) -> None:
    for test, record in config.stash[_records].items():
        for text in record["figures"]:
            terminalreporter.write_line(f"{', '.join(record['guarantees'])}: {text} ({test.rpartition('::')[2]})")
