"""Kernels on the CPU, in Triton's interpreter, which tests/conftest.py has asked for before anything imports Triton."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton has no builds for other systems than Linux. There alone a missing one may not fail the tests."""
    if sys.platform == "linux":
        return
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.skip(reason=f"Triton cannot be installed on {sys.platform}, only on Linux"))


@pytest.fixture(autouse=True)
def interpreter() -> None:
    if os.environ.get("DISTVSD_TEST_GPU") == "1":
        pytest.skip("in this process Triton compiles for the GPU; tests/gpu has the same comparisons")
    import triton

    assert triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 must be set before the first import of triton"
