"""The examples of docs/extending.md run as they stand there."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def blocks(page: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module for the page's code: dataclasses look their annotations up in one."""
    module = types.ModuleType("extending_example")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(ROOT)
    return module


def test_the_representation_of_the_page_conforms_and_trains(
    example: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    for block in blocks("extending.md"):
        exec(block, example.__dict__)
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("round ")]
    assert shown == [f"round {step}: healthy [0, 1]" for step in range(3)]
    start = example.BallsParticle(6, lambda step: 0.01).init(example.config.run.seed, torch.tensor([0, 1]))
    for name, value in start.items():
        moved = torch.stack([example.balls.parameters_of(particle_id)[name] for particle_id in (0, 1)])
        assert not torch.equal(moved, value) and bool(moved.isfinite().all())
