"""Whole trainings of fields that are read in occupied cells: ranks and an interruption change no bit."""

import dataclasses
from pathlib import Path

from distvsd.config import load_config
from distvsd.looking.opened import load_particles
from distvsd.run.contents import verify as verify_run
from distvsd.run.train import train
from distvsd.testing.ranks import run_ranks
from tests.small_run import SMOKE, overrides

# Read after the second and after the fourth round; a part of the cells is empty then.
READING = {
    "particles.nerf.occupancy": "{resolution: 8, every: 2, threshold: 0.05}",
    "particles.nerf.blob_density": 15,
    "schedule.rounds": 5,
    "checkpoint.every": 0,
}


def config(run, prior, **changes):
    return load_config(SMOKE, overrides(run, prior, **(READING | changes)))


def digests(run):
    lines = verify_run(Path(run.run.dir), digest=True)
    return dict(line.rsplit(" ", 1) for line in lines if len(line.split()[-1]) == 64)


def test_occupied_cells_have_the_same_bits_on_any_number_of_ranks_and_after_an_interruption(tmp_path, prior):
    """On one rank; on two that stop between two readings, and one that goes on; and on three."""
    alone, parts, three = (config(tmp_path / name, prior) for name in ("alone", "parts", "three"))
    train(alone)
    half = dataclasses.replace(parts, schedule=dataclasses.replace(parts.schedule, rounds=3))
    run_ranks(lambda world: train(half), 2)
    train(parts, resume="must")
    run_ranks(lambda world: train(three), 3)
    assert len(digests(alone)) >= 3 and digests(alone) == digests(parts) == digests(three)
    particles = load_particles(Path(alone.run.dir)).ensemble
    grids = [particles.parameters_of(particle_id)["occupancy"] for particle_id in particles.ids]
    empty = [((grid >= 0) & (grid <= 0.05)).float().mean() for grid in grids]
    assert all(0.1 < share < 0.95 for share in empty)


def test_a_mesh_takes_over_a_field_with_a_grid(tmp_path, prior):
    stages = """[{name: field, particles: {kind: nerf}, schedule: {rounds: 3}},
                 {name: mesh, particles: {kind: mesh}, schedule: {rounds: 1}}]"""
    changes = {"stages": stages, "particles.count": 1, "particles.mesh.grid": 6, "particles.mesh.threshold": 1}
    run = config(tmp_path / "run", prior, **changes)
    assert train(run) == 0
    last = load_particles(Path(run.run.dir) / "stages" / "2-mesh").ensemble
    assert "occupancy" not in last.parameters_of(0)
