"""A small state in the layout of a real checkpoint, and a run directory that holds it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distvsd.checkpoint import Saver, particle_file
from distvsd.checkpoint.format import folder_name
from distvsd.parallel.world import World

METADATA = {
    "config": {"run": {"seed": 3}, "objective": {"t_max": {0: 0.98, 5000: 0.5}}, "eps": 1e-15},
    "config_digest": "c" * 64,
    "prior_identity": "p" * 64,
    "metrics_bytes": 17,
    "tool": "kept, though the format does not know it",
}
ADAPTER_CONFIG = '{"r": 4, "lora_alpha": 4}'


def particle_state(particle: int, step: int) -> dict[str, Tensor]:
    values = torch.arange(12, dtype=torch.float32).reshape(3, 4) + 100 * particle + step
    return {
        "param/grid0": values,
        "adam_m/grid0": values / 7,
        "adam_v/grid0": values.square(),
        "adam_step": torch.tensor(step),
    }


def full_state(particles: int, step: int) -> dict[str, dict[str, Tensor]]:
    files = {particle_file(particle): particle_state(particle, step) for particle in range(particles)}
    files["score/adapter_model.safetensors"] = {"base_model.model.q.lora_A.weight": torch.ones(4, 8) * step}
    files["score/camera.safetensors"] = {"0.weight": torch.linspace(0, 1, 5).to(torch.bfloat16)}
    files["score/optimizer.safetensors"] = {"adam_step": torch.tensor([step]), "empty": torch.zeros(0, 3)}
    files["score/replay.safetensors"] = {"latents": torch.full((2, 4), -0.0), "mask": torch.tensor([True, False])}
    return files


@pytest.fixture
def world() -> World:
    return World(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture
def state() -> Callable[..., dict[str, dict[str, Tensor]]]:
    return full_state


@pytest.fixture
def metadata() -> dict[str, Any]:
    return METADATA


@pytest.fixture
def save(tmp_path: Path, world: World) -> Callable[..., Path]:
    """Saves steps of a run into `tmp_path` and returns the folder of the last."""

    def run(*steps: int, particles: int = 3, keep: int = 9) -> Path:
        saver = Saver(tmp_path / "checkpoints", world, keep, max_failures=1)  # so that a failure raises
        for step in steps:
            texts = {"score/adapter_config.json": ADAPTER_CONFIG}
            saver.begin(step, full_state(particles, step), texts, METADATA, {1: {"bad_steps": 2}})
        return tmp_path / "checkpoints" / folder_name(steps[-1])

    return run
