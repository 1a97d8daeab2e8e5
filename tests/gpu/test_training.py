"""Training on CUDA: whole runs on an untrained prior, and the guarantee of exact numerics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distvsd.config import Config, load_config
from distvsd.looking.opened import load_particles
from distvsd.parallel.world import World
from distvsd.run.build import build_run
from distvsd.run.contents import verify as verify_run
from distvsd.run.train import train
from distvsd.testing.pipelines import tiny_pipeline

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "configs" / "smoke.yaml"


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("prior"))


@pytest.fixture
def settings(tmp_path: Path, prior: Path) -> Callable[..., list[str]]:
    def make(name: str = "run", **changes: Any) -> list[str]:
        values = {
            "run.dir": tmp_path / name,
            "prior.path": prior,
            "particles.count": 7,
            "particles.nerf.max_resolution": 16,
            "particles.nerf.base_resolution": 8,
            "render.resolution": 32,
            "schedule.rounds": 4,
            "checkpoint.every": 2,
            "log.images_every": 2,
        }
        values |= {key.replace("__", "."): value for key, value in changes.items()}
        return [f"{key}={value}" for key, value in values.items()]

    return make


@pytest.fixture
def configured(settings: Callable[..., list[str]]) -> Callable[..., Config]:
    return lambda name="run", **changes: load_config(SMOKE, settings(name, **changes))


def digest_of(config: Config) -> str:
    return verify_run(Path(config.run.dir), digest=True)[-1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["nerf", "image"])
def test_a_run_trains_draws_and_is_read_on_the_cpu(configured: Callable[..., Config], kind: str, dtype: str) -> None:
    config = configured(particles__kind=kind, prior__dtype=dtype)
    assert train(config) == 0
    lines = [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
    assert [line["healthy"] for line in lines] == [7, 7, 7, 7]
    assert all(line["score_loss"] is not None and line["score_steps_skipped"] == 0 for line in lines)
    restored = load_particles(Path(config.run.dir), device="cpu")
    for particle_id in restored.ids:
        parameters = restored.ensemble.parameters_of(particle_id).values()
        assert all(value.device.type == "cpu" and bool(value.isfinite().all()) for value in parameters)


def test_a_run_really_is_on_the_device(configured: Callable[..., Config], device: torch.device) -> None:
    run = build_run(configured(), World(0, 1, 0, 1, device), lambda done: False)
    run.loop.round(0)
    tensors = [*run.ensemble.store.groups[0].parameters.values(), *run.training.score.trainable.values()]
    assert {tensor.device.type for tensor in tensors} == {"cuda"}


def test_a_resumed_run_goes_on(configured: Callable[..., Config]) -> None:
    assert train(configured(schedule__rounds=2)) == 0
    assert train(configured(), resume="must") == 0
    lines = (Path(configured().run.dir) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2, 3, 4]


def trained_in_a_new_process(arguments: list[str], ranks: int = 1) -> None:
    """Trains in a new process, because deterministic algorithms must be chosen before a process's first matrix
    product."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    subprocess.run(
        [sys.executable, *launcher, "-m", "distvsd.train", str(SMOKE), *arguments],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        check=True,
        timeout=300,
    )


def test_exact_numerics_repeat_every_bit(settings: Callable[..., list[str]], configured: Callable[..., Config]) -> None:
    for name in ("one", "two"):
        trained_in_a_new_process(settings(name, parallel__numerics="exact"))
    assert digest_of(configured("one")) == digest_of(configured("two"))


def test_exact_numerics_do_not_depend_on_the_number_of_gpus(
    settings: Callable[..., list[str]], configured: Callable[..., Config]
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for ranks in (1, 2):
        trained_in_a_new_process(settings(f"w{ranks}", parallel__numerics="exact"), ranks)
    assert digest_of(configured("w1")) == digest_of(configured("w2"))
