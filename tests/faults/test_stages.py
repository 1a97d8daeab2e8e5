"""The guarantees of one training hold for a run of three stages: a field, its mesh, the colours of the mesh.

Whole trainings on forked ranks with real signals and spoilt files. Kills at random instants are in test_kills.py, and
NaN, several ranks and hand-overs in tests/unit/run/test_mesh_stages.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from distvsd.checkpoint import particle_file, reader
from distvsd.config import Config
from distvsd.errors import RankError
from distvsd.faults import injected
from distvsd.parallel.world import World
from distvsd.run.contents import verify
from distvsd.run.train import train
from distvsd.testing.ranks import run_ranks
from tests.small_run import THREE_STAGES, three_stages

Figure = Callable[[str], None]
# Two rounds of a field, three of its geometry, five of its texture: rounds 2 and 3, counted from 0, name a stage.
STAGES = THREE_STAGES.replace(
    "mesh: {trained: texture}}, schedule: {rounds: 2}", "mesh: {trained: texture}}, schedule: {rounds: 5}"
)
FOLDERS = ("stages/1-nerf", "stages/2-geometry", "stages/3-texture")
WHEN = {"1-nerf": "step=1:nth=1", "2-geometry": "step=2:nth=1", "3-texture": "step=3:nth=1"}


def config(run: Path, prior: Path, *more: str) -> Config:
    return three_stages(run, prior, "checkpoint.asynchronous=false", *more, stages=STAGES)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, prior: Path) -> str:
    """The digest of the same run without any fault."""
    run = config(tmp_path_factory.mktemp("undisturbed") / "run", prior)
    assert run_ranks(lambda world: train(run), 1) == [0]
    return verify(Path(run.run.dir), digest=True)[-1]


def trained(run: Config, size: int, faults: str = "") -> list[int]:
    """The exit codes of the ranks."""

    def on_a_rank(world: World) -> int:
        with injected(faults):
            return train(run)

    return run_ranks(on_a_rank, size)


def errors(run: Config, faults: str, folder: Path) -> dict[int, str]:
    """What each of two ranks of a run that fails said at the end, by rank; a rank that was killed or stopped says
    nothing."""

    def attempt(world: World) -> None:
        try:
            with injected(faults):
                train(run)
        except RankError as error:
            (folder / f"{world.rank}.txt").write_text(str(error))
            raise

    with pytest.raises(RankError):
        run_ranks(attempt, 2)
    return {int(path.stem): path.read_text() for path in folder.glob("*.txt")}


@pytest.mark.guarantee("G24")
@pytest.mark.parametrize("stage", WHEN)
def test_a_signal_in_any_stage_saves_the_round_and_the_run_goes_on_to_the_same_bits(
    tmp_path: Path, prior: Path, undisturbed: str, figure: Figure, stage: str
) -> None:
    """SIGTERM to one of two ranks ends both with 3, and the same command on three ranks ends with the bits of an
    undisturbed run."""
    run = config(tmp_path / "run", prior)
    # A geometry of three rounds ends with its third: a signal there is one between two stages.
    assert trained(run, 2, f"term@render:rank=1:{WHEN[stage]}") == [3, 3]
    assert json.loads((tmp_path / "run/STATUS.json").read_text())["state"] == "preempted"
    assert trained(run, 3) == [0, 0, 0]
    assert verify(tmp_path / "run", digest=True)[-1] == undisturbed
    figure(f"SIGTERM in {stage}: the same bits")


@pytest.mark.guarantee("G19", "G9")
@pytest.mark.parametrize("stage", WHEN)
def test_a_rank_that_dies_in_any_stage_is_named_and_the_run_goes_on_to_the_same_bits(
    tmp_path: Path, prior: Path, undisturbed: str, figure: Figure, stage: str
) -> None:
    """kill -9 of one of two ranks: the other ends with its name."""
    run = config(tmp_path / "run", prior, "parallel.timeout_s=60")
    said = errors(run, f"kill@render:rank=1:{WHEN[stage]}", tmp_path)
    assert re.search(r"rank 1 \(host \S+, pid \d+, .*\) is gone", said[0])
    assert 1 not in said
    assert trained(run, 1) == [0]
    assert verify(tmp_path / "run", digest=True)[-1] == undisturbed
    figure(f"killed in {stage}: named; 0 bits different after the next call")


@pytest.mark.guarantee("G20")
def test_a_rank_that_hangs_while_it_draws_meshes_is_named(tmp_path: Path, prior: Path) -> None:
    """In the geometry stage: the other rank ends with its name after parallel.timeout_s."""
    run = config(tmp_path / "run", prior, "parallel.timeout_s=4")
    said = errors(run, f"stop@render:rank=1:{WHEN['2-geometry']}", tmp_path)
    assert re.search(r"rank 1 \(host \S+, pid \d+, .*\) is stopped", said[0])


@pytest.mark.guarantee("G5")
def test_a_disk_that_fails_once_in_every_stage_changes_no_bit(tmp_path: Path, prior: Path, undisturbed: str) -> None:
    """A save fails in each of the three stages; the run ends with the bits of an undisturbed one."""
    run = config(tmp_path / "run", prior)
    faults = "; ".join(f"enospc@save.write:rank=1:{when}" for when in ("step=1:nth=1", "step=2:nth=1", "step=3:nth=1"))
    assert trained(run, 2, faults) == [0, 0]
    assert verify(tmp_path / "run", digest=True)[-1] == undisturbed


@pytest.mark.guarantee("G3", "G4")
@pytest.mark.parametrize("at", [1, 2], ids=["geometry", "texture"])
def test_a_flipped_bit_in_the_newest_checkpoint_of_a_mesh_stage_costs_a_round_and_no_bit(
    tmp_path: Path, prior: Path, undisturbed: str, figure: Figure, at: int
) -> None:
    """The run was stopped after the second round of the stage."""
    run = config(tmp_path / "run", prior)
    assert trained(run, 2, f"term@render:rank=0:step=1:nth={2 * at + 1}") == [3, 3]
    folder = tmp_path / "run" / FOLDERS[at] / "checkpoints"
    assert reader.steps(folder)[0] == 2
    path = folder / "step-00000002" / particle_file(2)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    assert trained(run, 2) == [0, 0]
    assert verify(tmp_path / "run", digest=True)[-1] == undisturbed
    figure(f"one flipped bit in {FOLDERS[at]}: 1 round lost, 0 bits different at the end")


@pytest.mark.guarantee("G18")
@pytest.mark.parametrize("size", [1, 2])
def test_a_mesh_that_does_not_fit_into_memory_for_a_round_skips_it_and_changes_no_bit_of_the_others(
    tmp_path: Path, prior: Path, size: int
) -> None:
    """In a round of geometry, which trains no score network: so what the others get is as if nothing had been."""
    struck, whole = config(tmp_path / "struck", prior), config(tmp_path / "whole", prior)
    assert trained(struck, size, "oom@render:particle=1:step=2") == [0] * size
    assert trained(whole, size) == [0] * size

    def lines(run: Config) -> dict[str, str]:
        return dict(line.rsplit(" ", 1) for line in verify(Path(run.run.dir), digest=True))

    ours, theirs = lines(struck), lines(whole)
    different = {name for name in theirs if name.startswith("2-geometry/") and ours[name] != theirs[name]}
    assert different == {"2-geometry/particle/000001", "2-geometry/all"}
