"""The smallest whole run, for the tests that train one: a second or two on a core, with a random prior."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from distvsd.config import Config, load_config
from distvsd.errors import CheckpointError, DistvsdError
from distvsd.parallel.world import World
from distvsd.run.train import train
from distvsd.testing.ranks import run_ranks

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "configs" / "smoke.yaml"
TINY: dict[str, Any] = {
    "particles.nerf.samples_per_ray": 4,
    "particles.nerf.base_resolution": 4,
    "particles.nerf.max_resolution": 8,
    "render.resolution": 16,
    # What is measured depends on the machine's load, and with it the rounding of fast numerics.
    "particles.micro_batch": 0,
    "score.micro_batch": 0,
}


THREE_STAGES = """[
  {name: nerf, schedule: {rounds: 2}},
  {name: geometry, objective: {kind: sds}, particles: {kind: mesh, mesh: {signal: shaded, laplacian: 1}}},
  {name: texture, particles: {kind: mesh, mesh: {trained: texture}}, schedule: {rounds: 2}},
]"""


def overrides(run: Path, prior: Path, **changes: Any) -> list[str]:
    """The key=value arguments of three tiny particles in exact numerics; changes are dotted keys and their values."""
    settings = {
        "run.dir": run,
        "run.seed": 41,
        "prior.path": prior,
        "parallel.numerics": "exact",
        "particles.count": 3,
        "schedule.rounds": 4,
        "checkpoint.every": 2,
        "log.every": 4,  # a logged round measures the lag on every rank, which takes longer than the rest of the round
        **TINY,
        **changes,
    }
    return [f"{key}={value}" for key, value in settings.items()]


def small_config(run: Path, prior: Path, **changes: Any) -> Config:
    """The same as a configuration."""
    return load_config(SMOKE, overrides(run, prior, **changes))


def three_stages(run: Path, prior: Path, *more: str, **changes: Any) -> Config:
    """A field, its mesh and the colours of the mesh; saved after every round."""
    settings = {"stages": THREE_STAGES, "schedule.rounds": 3, "checkpoint.every": 1, "log.every": 1}
    settings |= {"particles.mesh.grid": 6, "particles.mesh.threshold": 1} | changes
    return load_config(SMOKE, [*overrides(run, prior, **settings), *more])


def refusals(config: Config, size: int) -> list[str]:
    """The error of each of `size` ranks that train this, with its class; '' for a rank that trains."""

    def attempt(world: World) -> str:
        try:
            train(config)
        except DistvsdError as error:
            return f"{type(error).__name__}: {error}"
        return ""

    return run_ranks(attempt, size)


def told(action: Callable[[], Any]) -> str:
    """The text of the CheckpointError that an action ends in."""
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return "no error"
