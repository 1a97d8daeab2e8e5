"""docs/guarantees.md lists exactly the marked tests, and every guarantee has one."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def guarantees() -> ModuleType:
    """tests/guarantees.py, loaded by its path because it is in no package."""
    spec = importlib.util.spec_from_file_location("guarantees_page", ROOT / "tests" / "guarantees.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_guarantee_has_a_test_and_every_test_a_known_guarantee(guarantees: ModuleType) -> None:
    proofs = guarantees.marked_tests()
    assert guarantees.unproved(proofs) == []
    assert guarantees.unknown(proofs) == []


def test_every_test_of_a_guarantee_says_what_is_promised(guarantees: ModuleType) -> None:
    silent = [f"{proof.file}::{proof.name}" for proof in guarantees.marked_tests() if not proof.promise]
    assert not silent, f"without a docstring: {', '.join(silent)}"


def test_the_page_names_exactly_the_tests_that_exist(guarantees: ModuleType) -> None:
    text = guarantees.PAGE.read_text(encoding="utf-8")
    named = [(number, test) for number, block in _blocks(text) for test in re.findall(r"`(tests/\S+::\w+)`", block)]
    expected = [
        (number, f"{proof.file}::{proof.name}") for proof in guarantees.marked_tests() for number in proof.numbers
    ]
    again = "make the page again: python -m pytest tests --guarantees FILE; python -m tests.guarantees FILE"
    assert sorted(named) == sorted(expected), again


def test_the_page_shows_no_failure(guarantees: ModuleType) -> None:
    text = guarantees.PAGE.read_text(encoding="utf-8")
    assert not re.findall(r"^- (?:failed|not run).*", text, re.MULTILINE)


def test_a_result_is_the_worst_of_its_cases_and_a_figure_is_said_once(guarantees: ModuleType) -> None:
    proof = guarantees.Proof("tests/test_a.py", "test_b", "Kept.", ("G1",))
    cases = {
        "tests/test_a.py::test_b[1]": {"outcome": "passed", "figures": ["7 of 7"]},
        "tests/test_a.py::test_b[2]": {"outcome": "failed", "figures": ["7 of 7"]},
        "tests/test_a.py::test_bb": {"outcome": "skipped", "figures": []},
    }
    (found,) = guarantees.with_outcomes([proof], cases)
    assert (found.result, found.outcomes, found.figures) == ("failed", ["passed", "failed"], ["7 of 7"])
    assert "- failed, 2 cases: `tests/test_a.py::test_b`. Kept. *7 of 7*" in guarantees.page([found])


def _blocks(text: str) -> list[tuple[str, str]]:
    """(number, text) of each guarantee on the page."""
    parts = re.split(r"^\*\*(G\d+)\. ", text, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))
