"""Tiny pipelines, written once a session for each layout and prediction type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from distvsd.prior import Pipeline, load_prior
from distvsd.testing.pipelines import tiny_pipeline

MakePipeline = Callable[..., Path]


@pytest.fixture(scope="session")
def shared_pipeline(tmp_path_factory: pytest.TempPathFactory) -> MakePipeline:
    """shared_pipeline(layout, prediction_type=None): a folder that tests only read."""
    made: dict[tuple[str, str | None], Path] = {}

    def make(layout: str, prediction_type: str | None = None) -> Path:
        key = (layout, prediction_type)
        if key not in made:
            made[key] = tiny_pipeline(tmp_path_factory.mktemp("prior") / layout, layout, prediction_type)  # type: ignore[arg-type]
        return made[key]

    return make


@pytest.fixture(scope="session")
def shared_prior(shared_pipeline: MakePipeline) -> Callable[..., Pipeline]:
    """shared_prior(layout, prediction_type=None): two prompts, a negative one; not to be changed."""
    loaded: dict[Path, Pipeline] = {}

    def load(layout: str, prediction_type: str | None = None) -> Pipeline:
        folder = shared_pipeline(layout, prediction_type)
        if folder not in loaded:
            loaded[folder] = load_prior(str(folder), ["a red cube", "a blue sphere"], negative_prompt="grey")
        return loaded[folder]

    return load


@pytest.fixture
def own_pipeline(tmp_path: Path) -> MakePipeline:
    """own_pipeline(layout): a folder that the test may damage."""
    return lambda layout: tiny_pipeline(tmp_path / layout, layout)
