"""Runs with cameras inside the particles: what they draw follows from the checkpoint, on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distvsd.cameras import AdaptiveSampler
from distvsd.config import Config
from distvsd.faults import injected
from distvsd.looking.opened import load_particles
from distvsd.run.contents import verify
from distvsd.run.train import train
from distvsd.testing.ranks import run_ranks
from tests.small_run import small_config

HOLLOW = {
    "prior.view_dependent": "false",
    "particles.nerf.blob_density": -20,
    "particles.nerf.blob_radius": 0.4,
    "particles.nerf.sparsity": 0,
    "particles.nerf.coverage": 0,
    "particles.views": 2,
    "cameras.kind": "scene",
    "cameras.antithetic": "true",
    "cameras.distance": "[0, 0.2]",
    "cameras.adaptive.bound": 0.5,
    "cameras.adaptive.clearance": 0.2,
    "stages": "[{name: fixed, schedule: {rounds: 1}}, {name: free, schedule: {rounds: 3}, cameras: {kind: adaptive}}]",
}


def configured(run: Path, prior: Path) -> Config:
    return small_config(run, prior, **HOLLOW, **{"checkpoint.every": 1})


def digest_of(config: Config) -> str:
    return verify(Path(config.run.dir), digest=True)[-1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, prior: Path) -> Config:
    """Three hollow fields, a round with fixed ranges and three with adaptive cameras, on one rank without a stop."""
    config = configured(tmp_path_factory.mktemp("whole") / "run", prior)
    assert train(config) == 0
    return config


def test_cameras_were_drawn_in_free_space(whole: Config) -> None:
    opened = load_particles(Path(whole.run.dir) / "stages" / "2-free")
    assert isinstance(opened.sampler, AdaptiveSampler)
    parameters = [opened.ensemble.parameters_of(i) for i in opened.ids]
    field = opened.particle.field({name: torch.stack([row[name] for row in parameters]) for name in parameters[0]})
    assert field is not None
    free = opened.sampler.free_space(torch.no_grad()(field), torch.tensor(opened.ids)).flatten(1).float().mean(1)
    # A ball of 0.4 in a cube of 1 has 0.27 of it.
    assert free.min() > 0.05 and free.max() < 0.4


def test_two_ranks_give_the_bits_of_one(whole: Config, tmp_path: Path, prior: Path) -> None:
    shared = configured(tmp_path / "run", prior)
    assert run_ranks(lambda world: train(shared), 2) == [0, 0]
    assert digest_of(shared) == digest_of(whole)


def test_a_resumed_run_draws_what_the_whole_one_drew(whole: Config, tmp_path: Path, prior: Path) -> None:
    stopped = configured(tmp_path / "run", prior)
    with injected("eio@round:step=2"), pytest.raises(OSError, match="injected"):
        train(stopped)
    assert train(stopped) == 0
    assert digest_of(stopped) == digest_of(whole)
