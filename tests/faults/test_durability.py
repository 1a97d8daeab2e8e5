"""A crash, a full disk or a damaged file loses at most one save and never an older checkpoint."""

from __future__ import annotations

import contextlib
import logging
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distvsd.checkpoint import Checkpoint, Saver, newest, particle_file, reader
from distvsd.errors import RankError
from distvsd.faults import POINTS, begin_round, injected
from distvsd.parallel.collectives import gather_objects, max_flags
from distvsd.parallel.world import World
from distvsd.testing.ranks import run_ranks
from tests.small_run import told

PAGE = Path(__file__).parents[2] / "docs" / "checkpoint-format.md"
METADATA = {"config": {}, "config_digest": "c", "prior_identity": "p", "metrics_bytes": 0}
NUM_PARTICLES = 5
Figure = Callable[[str], None]

# The kills during a save on three ranks: at every point, on every rank that passes it, and for several files. Rank 0
# writes five files: particles 0 and 3, the adapter, its configuration and the manifest. Rank 1 writes two files, rank 2
# writes one.
DEATHS = [
    *(f"kill@{point}:rank=0" for point in ("save.stage", "save.manifest", "save.rename", "save.swap")),
    *(f"kill@{point}:rank=0" for point in ("save.published", "save.prune", "save.discard")),
    "kill@save.discard:rank=0:nth=2",
    *(f"kill@{point}:rank=0:nth={n}" for point in ("save.write", "save.flush") for n in (1, 3, 5)),
    *(f"kill@{point}:rank=1:nth={n}" for point in ("save.write", "save.flush") for n in (1, 2)),
    *(f"kill@{point}:rank=2" for point in ("save.write", "save.flush")),
    *(f"kill@{point}" for point in ("save.write", "save.flush")),
]


def content(world: World, step: int, generation: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """This rank's files for a step. `generation` distinguishes two saves of the same step."""
    mark = torch.tensor([step, generation])
    files = {
        particle_file(particle): {"param/grid": torch.full((400,), float(particle)), "mark": mark}
        for particle in range(world.rank, NUM_PARTICLES, world.size)
    }
    if world.rank > 0:
        return files, {}
    files["score/adapter_model.safetensors"] = {"lora": torch.ones(8) * step, "mark": mark}
    return files, {"score/adapter_config.json": "{}"}


def save(world: World, folder: Path, steps: list[int], generation: int = 0, keep: int = 2, failures: int = 1) -> Saver:
    """Saves the steps in order, each in the background, and waits for each."""
    saver = Saver(folder, world, keep, asynchronous=True, max_failures=failures)
    for step in steps:
        begin_round(step)
        saver.begin(step, *content(world, step, generation), METADATA)
        saver.finish()
    return saver


def marks(checkpoint: Checkpoint) -> set[tuple[int, ...]]:
    """The (step, generation) pairs in the tensor files of a checkpoint. More than one means that two saves were
    mixed."""
    files = [file for file in checkpoint.manifest.files if file.endswith(".safetensors")]
    assert len(files) == NUM_PARTICLES + 1
    return {tuple(checkpoint.read(file)["mark"].tolist()) for file in files}


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if reader.step_of(path.name) is None)


def killed(folder: Path, death: str) -> None:
    """Saves step 5 again on three ranks and kills one or all of them during the save. The others must detect this."""

    def rerun(world: World) -> None:
        with injected(death):
            save(world, folder, [5], generation=1)

    with pytest.raises(RankError) as caught:
        run_ranks(rerun, 3, timeout_s=30)
    text = str(caught.value)
    assert "exit code -9" in text and "hangs" not in text and "did not notice" not in text, f"{death}: {text}"


@pytest.mark.guarantee("G1", "G2")
def test_a_kill_at_any_point_of_a_save_leaves_the_old_checkpoint_or_the_new_one(tmp_path: Path, figure: Figure) -> None:
    """kill -9 of a rank at any point of a save loses at most the checkpoint being written, even if it replaces another.

    Step 5 is saved a second time, and the save is killed at every named point. After the next start, step 5 is either
    entirely the old or entirely the new one. The next save succeeds on another number of ranks.
    """
    base = tmp_path / "base"
    run_ranks(save, 3, base, [3, 4, 5], 0, 9)
    seen = []
    for number, death in enumerate(DEATHS):
        folder = shutil.copytree(base, tmp_path / str(number))
        killed(folder, death)
        found = newest(folder)  # what a reader finds before the cleanup
        assert found is not None and marks(found) <= {(4, 0), (5, 0), (5, 1)} and len(marks(found)) == 1, death

        def restart(world: World, folder: Path = folder) -> list[set[tuple[int, ...]]]:
            saver = Saver(folder, world)
            checkpoint = saver.load()
            assert checkpoint is not None
            found = marks(checkpoint)
            gather_objects(world, None)  # waits until every rank has read its marks
            saver.begin(6, *content(world, 6, 1), METADATA)
            return [found, marks(reader.open_checkpoint(folder, 6))]

        results = run_ranks(restart, 2)
        assert results[0] == results[1] and results[0] in ([{(5, 0)}, {(6, 1)}], [{(5, 1)}, {(6, 1)}]), (
            f"{death}: {results}"
        )
        assert reader.steps(folder) == [6, 5] and leftovers(folder) == [], death
        seen.append(results[0][0] == {(5, 1)})
    assert any(seen) and not all(seen), "no kill was before the publication, or none was after it"
    points = {death.partition("@")[2].partition(":")[0] for death in DEATHS}
    figure(f"{len(DEATHS)} kills at {len(points)} points of a save on 3 ranks: 0 unreadable, 0 mixed, 0 hangs")


def test_the_points_that_are_struck_are_all_there_are_and_the_page_names_them() -> None:
    points = {point for point in POINTS if point.startswith("save.")}
    assert {death.partition("@")[2].partition(":")[0] for death in DEATHS} == points
    page = PAGE.read_text(encoding="utf-8")
    assert [point for point in sorted(points | {"load.read"}) if f"`{point}`" not in page] == []


@pytest.mark.guarantee("G2")
@pytest.mark.parametrize("there", ["complete", "partial", "torn", "staged"])
def test_a_step_that_was_saved_before_is_saved_again_without_a_wait_or_a_mixture(
    tmp_path: Path, figure: Figure, there: str
) -> None:
    """Saving a step whose folder exists, complete or partial, never hangs and never mixes two states."""
    folder = tmp_path / "checkpoints"
    run_ranks(save, 3, folder, [4, 5])
    place = folder / "step-00000005"
    match there:
        case "partial":
            (place / "manifest.json").unlink()
        case "torn":
            (place / "particles/000004.safetensors").write_bytes(b"")
            (place / "particles/000009.safetensors").write_bytes(b"of an older run")
        case "staged":
            place.rename(folder / ".staged-step-00000005-0123")

    def again(world: World) -> float:
        saver = Saver(folder, world)
        began = time.monotonic()
        saver.begin(5, *content(world, 5, 1), METADATA)
        return time.monotonic() - began

    seconds = max(run_ranks(again, 2))
    found = newest(folder)
    assert found is not None and marks(found) == {(5, 1)}
    assert reader.steps(folder) == [5, 4] and leftovers(folder) == []
    figure(f"{there}: saved again in {seconds:.2f} s")


ERRORS = [
    *(("enospc", point) for point in POINTS if point.startswith("save.")),
    ("edquot", "save.flush"),
    ("eio", "save.published"),
]


@pytest.mark.guarantee("G5")
@pytest.mark.parametrize(("kind", "point"), ERRORS)
def test_a_disk_error_at_any_point_of_a_save_costs_that_save_only(tmp_path: Path, kind: str, point: str) -> None:
    """A full disk, an exceeded quota or an I/O error fails one save and changes nothing else. The next save works.

    The failure is counted. An error after the publication, while old checkpoints are deleted, does not fail the save.
    """
    folder = tmp_path / "checkpoints"
    run_ranks(save, 2, folder, [3, 4, 5], 0, 9)

    def run(world: World) -> tuple[int, int, str]:
        saver = Saver(folder, world, asynchronous=True, max_failures=2)
        with injected(f"{kind}@{point}:nth=1") as plan:  # on every rank that passes it
            saver.begin(5, *content(world, 5, 1), METADATA)
            assert (saver.finish() is None) == bool(saver.failures)
            struck = plan[0].met
        failures, message = saver.failures, saver.last_failure
        saver.begin(6, *content(world, 6, 1), METADATA)
        assert saver.finish() == folder / "step-00000006" and saver.failures == 0
        return struck, failures, message

    results = run_ranks(run, 2)
    (struck, failures, message), other = results
    assert struck > 0 and other[1:] == (failures, message)
    is_published = point in ("save.prune", "save.discard")
    assert failures == (0 if is_published else 1)
    assert is_published or (f"injected at {point}" in message and "check the free space" in message)
    run_ranks(lambda world: Saver(folder, world) and None, 1)  # the constructor deletes the leftovers
    assert reader.steps(folder) == [6, 5] and leftovers(folder) == []
    assert marks(reader.open_checkpoint(folder, 6)) == {(6, 1)}
    assert marks(reader.open_checkpoint(folder, 5)) == {(5, 1 if is_published else 0)}


@pytest.mark.guarantee("G5")
def test_saves_that_go_on_failing_end_the_run_with_the_old_checkpoints_intact(tmp_path: Path) -> None:
    """After `checkpoint.max_failures` failed saves in a row the run ends with the same error on every rank."""
    folder = tmp_path / "checkpoints"
    run_ranks(save, 2, folder, [1, 2])

    def run(world: World) -> tuple[list[int], str]:
        saver = Saver(folder, world, asynchronous=True, max_failures=3)
        counts = []
        with injected("enospc@save.flush:rank=1"):
            for step in (3, 4):
                saver.begin(step, *content(world, step, 0), METADATA)
                saver.finish()
                counts.append(saver.failures)
            saver.begin(5, *content(world, 5, 0), METADATA)
            return counts, told(saver.finish)

    results = run_ranks(run, 2)
    assert results[0] == results[1] and results[0][0] == [1, 2]
    assert "3 saves in a row failed (checkpoint.max_failures is 3)" in results[0][1]
    assert "rank 1: [Errno 28]" in results[0][1]
    assert reader.steps(folder) == [2, 1] and leftovers(folder) == []


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """Mounts a file system of that size on `folder`. Skips the test if mounting is not permitted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a file system needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.guarantee("G5")
def test_a_disk_that_really_is_full_costs_a_save_and_nothing_else(tmp_path: Path, figure: Figure) -> None:
    """When a file system of 8 MB fills up, the run continues. It saves again once there is space."""
    with small_disk(tmp_path / "disk", 8):
        folder = tmp_path / "disk" / "checkpoints"

        def run(world: World) -> tuple[str, list[int], int]:
            saver = Saver(folder, world, asynchronous=True, max_failures=2)
            refused = told(lambda: saver.preflight(2 * 2**20))  # 4 MB per checkpoint; three must fit
            saver.begin(1, *content(world, 1, 0), METADATA)
            saver.finish()
            large = {particle_file(100 + world.rank): {"param": torch.zeros(5 * 2**18)}}  # 5 MB per rank, 10 MB in all
            saver.begin(2, large, {}, METADATA)
            saver.finish()
            failed = saver.failures
            there = reader.steps(folder)
            saver.begin(3, *content(world, 3, 0), METADATA)
            saver.finish()
            return refused, there, failed

        results = run_ranks(run, 2)
        refused, there, failed = results[0]
        assert "is too small" in refused and "make room" in refused and results[0] == results[1]
        assert (there, failed) == ([1], 1)
        assert reader.steps(folder) == [3, 1] and leftovers(folder) == []
        assert newest(folder) is not None
    figure("8 MB disk, 10 MB checkpoint: the run went on, 0 partial folders left, the next save worked")


@pytest.mark.guarantee("G7")
def test_what_is_saved_is_the_state_at_that_moment_however_the_run_goes_on(tmp_path: Path, figure: Figure) -> None:
    """An asynchronous save holds the state of one round, even if the run changes that state during the write."""
    folder = tmp_path / "checkpoints"

    def run(world: World) -> tuple[bool, float]:
        saver = Saver(folder, world, asynchronous=True)
        files, texts = content(world, 7, 0)
        health: dict[int, dict[str, Any]] = {world.rank: {"bad": 1}}
        metadata = {**METADATA, "config": {"rates": [1]}}
        with injected("sleep@save.write:ms=500:nth=1"):
            began = time.monotonic()
            saver.begin(7, files, texts, metadata, health)
            stall = time.monotonic() - began
            for tensors in files.values():
                for tensor in tensors.values():
                    tensor.mul_(0)
            files.clear()
            texts["score/adapter_config.json"] = "changed"
            health[world.rank]["bad"] = 99
            metadata["config"]["rates"].append(2)
            was_writing = saver.writing and saver.pending == 7
            assert saver.finish() == folder / "step-00000007"
        assert saver.pending is None and not saver.writing
        return was_writing, stall

    results = run_ranks(run, 2)
    assert all(was_writing for was_writing, _ in results)
    found = newest(folder)
    assert found is not None and marks(found) == {(7, 0)}
    assert [found.read(particle_file(n))["param/grid"][0].item() for n in range(NUM_PARTICLES)] == [0, 1, 2, 3, 4]
    assert [entry.health for entry in found.manifest.particles] == [{"bad": 1}, {"bad": 1}, {}, {}, {}]
    assert found.manifest.config == {"rates": [1]} and (found.folder / "score/adapter_config.json").read_text() == "{}"
    figure(f"the run stood still for {max(stall for _, stall in results) * 1000:.0f} ms of a save of over 500 ms")


@pytest.mark.guarantee("G7", "G23")
def test_a_failure_in_the_background_is_known_to_all_ranks_when_the_writing_has_ended(tmp_path: Path) -> None:
    """A failed write in the background is reported on all ranks, in the next round in which no rank is still
    writing."""
    folder = tmp_path / "checkpoints"

    def run(world: World) -> tuple[list[int], str]:
        saver = Saver(folder, world, asynchronous=True)
        counts = []
        with injected("eio@save.flush:rank=1; sleep@save.write:rank=0:ms=100:nth=1"):
            saver.begin(1, *content(world, 1, 0), METADATA)
            while saver.pending is not None:  # like the rounds of a training loop
                if not max_flags(world, int(saver.writing)):
                    assert saver.finish() is None
                time.sleep(0.01)
            counts.append(saver.failures)
        saver.begin(2, *content(world, 2, 0), METADATA)
        message = saver.last_failure
        saver.begin(3, *content(world, 3, 0), METADATA)  # finishes the save of step 2
        counts.append(saver.failures)
        saver.finish()
        return counts, message

    results = run_ranks(run, 3)
    assert results == [results[0]] * 3
    assert results[0][0] == [1, 0] and "rank 1: [Errno 5]" in results[0][1]
    assert reader.steps(folder) == [3, 2] and leftovers(folder) == []


@pytest.mark.guarantee("G8")
def test_nothing_points_to_a_checkpoint_that_is_still_being_written(tmp_path: Path) -> None:
    """Readers find a checkpoint only after all of it is on the disk. No pointer could name it earlier."""
    folder = tmp_path / "checkpoints"

    def run(world: World) -> list[Any]:
        saver = Saver(folder, world, asynchronous=True)
        saver.begin(1, *content(world, 1, 0), METADATA)
        saver.finish()
        with injected("sleep@save.flush:rank=1:ms=300:nth=1"):
            saver.begin(2, *content(world, 2, 0), METADATA)
            seen = []
            while max_flags(world, int(saver.writing)):
                found = newest(folder)
                assert found is not None
                seen.append(found.manifest.step)
        names = [name for name in leftovers(folder) if not name.startswith(".staged-step-00000002-")]
        saver.finish()
        return [sorted(set(seen)), names]

    assert run_ranks(run, 2) == [[[1], []]] * 2
    assert reader.steps(folder) == [2, 1] and leftovers(folder) == []


@pytest.mark.guarantee("G6")
def test_a_checkpoint_that_was_found_damaged_is_not_counted_among_those_that_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At least two sound checkpoints stay. A checkpoint that a resume found damaged is not counted as one of them."""
    folder = tmp_path / "checkpoints"
    run_ranks(save, 2, folder, [1, 2, 3, 4], 0, 9)
    for step in (3, 4):
        path = folder / f"step-{step:08d}" / particle_file(0)
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")  # same size: only reading finds the damage

    def resume(world: World) -> int:
        saver = Saver(folder, world, keep=2)
        checkpoint = saver.load()
        assert checkpoint is not None
        saver.begin(3, *content(world, 3, 1), METADATA)
        saver.begin(4, *content(world, 4, 1), METADATA)
        return checkpoint.manifest.step

    with caplog.at_level(logging.WARNING):
        assert run_ranks(resume, 2) == [2, 2]
    assert reader.steps(folder) == [4, 3]
    assert [marks(reader.open_checkpoint(folder, step)) for step in (4, 3)] == [{(4, 1)}, {(3, 1)}]


@pytest.mark.guarantee("G4")
def test_a_disk_that_fails_while_loading_falls_back_loudly_and_on_all_ranks(tmp_path: Path) -> None:
    """If one rank cannot read a file, all ranks load the same older checkpoint."""
    folder = tmp_path / "checkpoints"
    run_ranks(save, 2, folder, [4, 5])

    def load(world: World) -> int | None:
        with injected("eio@load.read:rank=1:nth=2"):
            checkpoint = Saver(folder, world).load()
        return checkpoint and checkpoint.manifest.step

    assert run_ranks(load, 2) == [4, 4]
