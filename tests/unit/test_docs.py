"""The examples of docs/extending.md run as they stand there."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distvsd.looking.opened import load_particles

ROOT = Path(__file__).parents[2]


def blocks(page: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[types.ModuleType]:
    """The page's code, run from the top to the bottom in the project's folder.

    A module, because dataclasses look their annotations up in one.
    """
    with pytest.MonkeyPatch.context() as patch:
        module = types.ModuleType("extending_example")
        module.folder = tmp_path_factory.mktemp("runs")  # type: ignore[attr-defined]
        patch.setitem(sys.modules, module.__name__, module)
        patch.chdir(ROOT)
        for block in blocks("extending.md"):
            exec(block, module.__dict__)
        yield module


def parameters(example: types.ModuleType, run: str, **custom: Any) -> list[dict[str, torch.Tensor]]:
    opened = load_particles(example.folder / run, custom=example.Custom(**custom))
    return [opened.ensemble.parameters_of(particle_id) for particle_id in (0, 1)]


def test_the_representation_of_the_page_trains_and_is_saved_like_any_other(example: types.ModuleType) -> None:
    start = example.balls.init(example.config.run.seed, torch.tensor([0, 1]))
    trained = parameters(example, "balls", particle=example.balls)
    for name, value in start.items():
        moved = torch.stack([particle[name] for particle in trained])
        assert not torch.equal(moved, value) and bool(moved.isfinite().all())


def test_the_objective_of_the_page_trains_without_a_score_network(example: types.ModuleType) -> None:
    [checkpoint] = (example.folder / "csd" / "checkpoints").iterdir()
    files = [file.relative_to(checkpoint).parts for file in checkpoint.rglob("*") if file.is_file()]
    assert not any("score" in parts for parts in files) and sum("particles" in parts for parts in files) == 2


def test_the_sampler_of_the_page_takes_clearer_places_than_the_orbit_it_draws_from(example: types.ModuleType) -> None:
    def ball(points: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(20 * (0.8 - points.norm(dim=-1)))

    ids = torch.arange(50)
    for sampler, most in ((example.clearest, 0.01), (example.clearest.orbit, 1.0)):
        places = sampler.sample(0, ids, 0, 2, ball).extrinsics[..., :3, 3]
        crowded = float((ball(places) > 0.5).float().mean())
        assert crowded <= most
    assert crowded > 0.3  # of the last sampler, the plain orbit
    assert len(parameters(example, "seen")) == 2


def test_the_network_of_the_page_trains_particles(example: types.ModuleType) -> None:
    assert all(bool(value.isfinite().all()) for particle in parameters(example, "flow") for value in particle.values())
