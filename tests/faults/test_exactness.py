"""Whole trainings end with the same bits after a kill and a resume, and on any number of ranks.

Every run with exact numerics must equal one reference, which is trained on one rank without interruption.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distvsd.checkpoint.reader import steps
from distvsd.config import Config, load_config
from distvsd.errors import ConfigError, RankError
from distvsd.faults import injected
from distvsd.run.contents import verify as verify_run
from distvsd.run.train import train
from distvsd.testing.ranks import run_ranks
from tests.small_run import refusals

Figure = Callable[[str], None]
SMOKE = Path(__file__).parents[2] / "configs" / "smoke.yaml"
PARTICLES = 5
# Six rounds with saves after rounds 2 and 4. The kill comes at the start of the sixth round. Resolution, learning rate
# and replay change during the run. metrics.jsonl gets two lines. The line of round 5 is written before the kill and
# again after the resume from round 4.
SMALL = {
    "run.seed": 41,
    "prompt": "a red cube",
    "particles.count": PARTICLES,
    "particles.micro_batch": 0,
    "score.micro_batch": 0,
    "particles.nerf.samples_per_ray": 4,
    "particles.nerf.base_resolution": 8,
    "particles.nerf.max_resolution": 8,
    "render.resolution": "{0: 16, 3: 24}",
    "particles.learning_rate": "{linear: {0: 0.05, 6: 0.01}}",
    "schedule.rounds": 6,
    "checkpoint.every": 2,
    "score.rank": 2,
    "score.replay_share": 0.25,
    "log.every": 5,
}
DEATH = "kill@round:step=5"
# The fields of metrics.jsonl that come from the computation. The others measure time.
MATHEMATICS = ("round", "score_loss", "score_steps_skipped", "lag", "healthy", "quarantined", "resolution", "t_max")
State = tuple[dict[str, str], list[dict[str, Any]]]


def training(run: Path, prior: Path, numerics: str = "exact", **changes: Any) -> Config:
    settings = {"run.dir": run, "prior.path": prior, "parallel.numerics": numerics} | SMALL
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return load_config(SMOKE, [f"{key}={value}" for key, value in settings.items()])


def state_of(run: Path) -> State:
    """Digests of all components, and the MATHEMATICS fields of metrics.jsonl."""
    digests = dict(line.rsplit(" ", 1) for line in verify_run(run, digest=True))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return digests, [{key: line[key] for key in MATHEMATICS} for line in lines]


def killed(config: Config, size: int) -> Path:
    """Trains on `size` ranks until kill -9 ends all of them in the sixth round; returns the run directory."""
    with injected(DEATH), pytest.raises(RankError, match="exit code -9"):
        run_ranks(lambda world: train(config), size)
    run = Path(config.run.dir)
    assert steps(run / "checkpoints"), "the killed run had saved nothing"
    return run


def resumed(killed_run: Path, run: Path, config: Callable[[Path], Config], size: int) -> State:
    """The final state of a copy of a killed run that is resumed on `size` ranks."""
    shutil.copytree(killed_run, run)
    assert run_ranks(lambda world: train(config(run)), size) == [0] * size
    return state_of(run)


def differing(found: State, expected: State) -> list[str]:
    """The components whose bits differ, and the rounds whose metrics do."""
    keys = expected[0].keys() | found[0].keys()
    components = sorted(key for key in keys if found[0].get(key) != expected[0].get(key))
    rounds = [f"metrics {a} and {b}" for a, b in zip(found[1], expected[1], strict=False) if a != b]
    return components + rounds + (["the number of lines"] if len(found[1]) != len(expected[1]) else [])


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, prior: Path) -> State:
    """The final state of an uninterrupted run with exact numerics on one rank."""
    run = tmp_path_factory.mktemp("reference") / "run"
    config = training(run, prior)
    run_ranks(lambda world: train(config), 1)
    found = state_of(run)
    assert len([name for name in found[0] if name.startswith("particle/")]) == PARTICLES and len(found[1]) == 2
    return found


@pytest.fixture(scope="module")
def killed_on(tmp_path_factory: pytest.TempPathFactory, prior: Path) -> Callable[[int], Path]:
    """Returns the run that was killed on that number of ranks. Each is trained once."""
    made: dict[int, Path] = {}

    def run(size: int) -> Path:
        if size not in made:
            made[size] = killed(training(tmp_path_factory.mktemp("killed") / f"on-{size}", prior), size)
        return made[size]

    return run


@pytest.mark.guarantee("G9")
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_run_killed_and_resumed_equals_one_that_was_not(
    tmp_path: Path, prior: Path, reference: State, killed_on: Callable[[int], Path], figure: Figure, size: int
) -> None:
    """Exact numerics: kill -9 of all ranks and a resume change no bit of particles, score network, optimisers, replay
    or metrics."""
    found = resumed(killed_on(size), tmp_path / "run", lambda run: training(run, prior), size)
    assert not differing(found, reference), differing(found, reference)
    figure(f"0 of {len(found[0]) - 1} components differ on {size} rank{'s' * (size > 1)}")


@pytest.mark.guarantee("G9")
@pytest.mark.parametrize("size", [2, 3])
def test_fast_numerics_resume_with_the_same_bits_on_the_same_number_of_ranks(
    tmp_path: Path, prior: Path, figure: Figure, size: int
) -> None:
    """Fast numerics: kill -9 of all ranks and a resume on the same number of ranks change no bit."""
    whole = training(tmp_path / "whole", prior, "fast")
    run_ranks(lambda world: train(whole), size)
    broken_off = killed(training(tmp_path / "killed", prior, "fast"), size)
    found = resumed(broken_off, tmp_path / "run", lambda run: training(run, prior, "fast"), size)
    different = differing(found, state_of(Path(whole.run.dir)))
    assert not different, different
    figure(f"fast numerics: 0 of {len(found[0]) - 1} components differ on {size} ranks")


@pytest.mark.guarantee("G10", "G11")
@pytest.mark.parametrize(("before", "after"), [(4, 1), (4, 2), (4, 3), (4, 6), (1, 4), (3, 2)])
def test_a_run_goes_on_with_the_same_bits_on_another_number_of_ranks(
    tmp_path: Path,
    prior: Path,
    reference: State,
    killed_on: Callable[[int], Path],
    figure: Figure,
    before: int,
    after: int,
) -> None:
    """Exact numerics: a run saved by any number of ranks continues on any other number. It ends with the bits of an
    uninterrupted run on one rank."""
    found = resumed(killed_on(before), tmp_path / "run", lambda run: training(run, prior), after)
    assert not differing(found, reference), differing(found, reference)
    figure(f"{before} -> {after} ranks, {PARTICLES} particles: the same bits")


@pytest.mark.guarantee("G12")
def test_exact_numerics_refuse_a_renderer_that_adds_in_no_fixed_order(tmp_path: Path, prior: Path) -> None:
    """Exact numerics are refused with a renderer whose sums change from run to run. The refusal comes before anything
    is loaded and names the renderers that can be used."""
    with pytest.raises(ConfigError, match=r"render\.backend is nerfacc.*exact.*auto, torch"):
        training(tmp_path / "run", prior, render__backend="nerfacc")
    assert not (tmp_path / "run").exists()


@pytest.mark.guarantee("G14")
def test_another_configuration_is_refused_with_what_differs_and_accepted_when_it_is_meant(
    tmp_path: Path, prior: Path
) -> None:
    """A resume with a configuration that changes the computation is refused on every rank. The message lists each
    changed key and both values. `--resume must` accepts the change. Settings for checkpoints and logs may change
    freely."""
    few = {"particles__count": 2, "schedule__rounds": 2}
    before = training(tmp_path / "run", prior, **few)
    assert refusals(before, 2) == ["", ""]
    checkpoints = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())

    changed = training(tmp_path / "run", prior, prior__guidance_scale=4, score__learning_rate=0.5, **few)
    said = refusals(changed, 2)
    assert said[0] == said[1] and said[0].startswith("RunError: ")
    was = f"prior.guidance_scale: {before.prior.guidance_scale:g}"
    for part in (was, "score.learning_rate: ", " became 4", " became 0.5", "--resume must"):
        assert part in said[0]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == checkpoints
    assert run_ranks(lambda world: train(changed, resume="must"), 2) == [0, 0]

    keeping = dataclasses.replace(changed, log=dataclasses.replace(changed.log, every=2))
    keeping = dataclasses.replace(keeping, checkpoint=dataclasses.replace(changed.checkpoint, keep=3))
    assert refusals(keeping, 2) == ["", ""]
