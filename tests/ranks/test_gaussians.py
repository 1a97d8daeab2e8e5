"""Whole trainings of gaussians with growth: the number of ranks and an interruption change no bit."""

import dataclasses
from pathlib import Path

import torch

from distvsd.config import load_config
from distvsd.looking.opened import load_particles
from distvsd.run.contents import verify as verify_run
from distvsd.run.train import train
from distvsd.testing.ranks import run_ranks
from tests.small_run import SMOKE, overrides

# Some gaussians fade below min_opacity in each round; they are relocated in the second and in the fourth.
GROWING = {
    "particles.kind": "gaussians",
    "particles.learning_rate": 0.05,
    "particles.gaussians": "{capacity: 40, relocate_every: 2, noise: 100, init_opacity: 0.3, min_opacity: 0.29}",
    "schedule.rounds": 4,
    "checkpoint.every": 0,
}


def config(run, prior, **changes):
    return load_config(SMOKE, overrides(run, prior, **(GROWING | changes)))


def digests(run):
    lines = verify_run(Path(run.run.dir), digest=True)
    return dict(line.rsplit(" ", 1) for line in lines if len(line.split()[-1]) == 64)


def moved(run):
    """Gaussians of all particles whose moments are zero: relocations that no later round has touched."""
    particles = load_particles(Path(run.run.dir)).ensemble
    return sum(int((state["adam_v/means"] == 0).all(-1).sum()) for state in particles.state().values())


def test_growth_has_the_same_bits_on_any_number_of_ranks_and_after_an_interruption(tmp_path, prior):
    """Three particles of 40 gaussians: on one rank, and on two that stop after three rounds and one that goes on."""
    alone, parts = (config(tmp_path / name, prior) for name in ("alone", "parts"))
    train(alone)
    half = dataclasses.replace(parts, schedule=dataclasses.replace(parts.schedule, rounds=3))
    run_ranks(lambda world: train(half), 2)
    train(parts, resume="must")
    assert len(digests(alone)) >= 3 and digests(alone) == digests(parts)
    assert moved(alone) > 0


def test_gaussians_go_on_from_the_fields_of_the_stage_before(tmp_path, prior):
    stages = """[{name: field, particles: {kind: nerf}, schedule: {rounds: 1}},
                 {name: splats, particles: {kind: gaussians}, schedule: {rounds: 2}}]"""
    run = config(tmp_path / "run", prior, **{"stages": stages, "particles.count": 2})
    assert train(run) == 0
    last = load_particles(Path(run.run.dir) / "stages" / "2-splats").ensemble
    means = [last.parameters_of(particle_id)["means"] for particle_id in (0, 1)]
    assert means[0].shape == (40, 3) and not torch.equal(*means)
    assert bool(torch.stack(means).isfinite().all())
