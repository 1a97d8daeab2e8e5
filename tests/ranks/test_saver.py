"""Ranks save and load together. Any number of ranks gives the same checkpoint, and all ranks raise the same error."""

from __future__ import annotations

import functools
import random
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distvsd.checkpoint import Saver, particle_file, store, verify_run
from distvsd.checkpoint.format import FileEntry
from distvsd.checkpoint.snapshot import OnDemand
from distvsd.faults import injected
from distvsd.parallel.world import World
from distvsd.testing.ranks import run_ranks
from tests.small_run import told

NUM_PARTICLES = 7
METADATA = {"config": {}, "config_digest": "c", "prior_identity": "p", "metrics_bytes": 0}
SCORE = "score/adapter_model.safetensors"


def shard(rank: int, size: int, step: int) -> dict[str, dict[str, Tensor]]:
    """Every size-th particle. With more ranks than particles, some ranks have none."""
    return {
        particle_file(particle): {"param/grid0": torch.arange(5.0) + particle, "adam_step": torch.tensor(step)}
        for particle in range(rank, NUM_PARTICLES, size)
    }


def save(world: World, folder: Path, *steps: int) -> None:
    saver = Saver(folder, world, keep=9, max_failures=1)  # so that a failure raises
    for step in steps:
        files = shard(world.rank, world.size, step)
        texts = {}
        if world.rank == 0:
            files[SCORE] = {"lora_A": torch.ones(2, 3) * step}
            texts["score/adapter_config.json"] = "{}"
        health = {particle: {"rank": world.rank} for particle in range(world.rank, NUM_PARTICLES, world.size)}
        saver.begin(step, files, texts, METADATA, health)


def test_any_number_of_ranks_saves_the_same_state(tmp_path: Path) -> None:
    digests = []
    for size in (1, 2, 3, 9):
        run_ranks(save, size, tmp_path / str(size) / "checkpoints", 4)
        digests.append(verify_run(tmp_path / str(size), digest=True))
    assert all(lines == digests[0] for lines in digests)
    assert [line.split()[0] for line in digests[0]] == [f"particle/{n:06d}" for n in range(7)] + [
        "score/adapter",
        "all",
    ]


def test_other_ranks_read_what_they_need_from_the_same_checkpoint(tmp_path: Path) -> None:
    run_ranks(save, 3, tmp_path / "checkpoints", 4, 5)

    def load(world: World) -> tuple[int, int, list[int], int]:
        checkpoint = Saver(tmp_path / "checkpoints", world).load()
        assert checkpoint is not None
        values = {file: checkpoint.read(file) for file in shard(world.rank, world.size, 5)}
        for file, expected in shard(world.rank, world.size, 5).items():
            assert all(torch.equal(values[file][name], expected[name]) for name in expected)
        saved_by = [int(entry.health["rank"]) for entry in checkpoint.manifest.particles]
        return checkpoint.manifest.step, checkpoint.manifest.world_size, saved_by, len(values)

    results = run_ranks(load, 2)
    assert results == [(5, 3, [0, 1, 2, 0, 1, 2, 0], 4), (5, 3, [0, 1, 2, 0, 1, 2, 0], 3)]


@pytest.mark.guarantee("G5")
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_one_rank_that_cannot_write_is_one_error_on_all_and_no_checkpoint(tmp_path: Path, failing: int) -> None:
    """If one rank cannot write, all ranks raise the same error and the checkpoints stay unchanged."""
    folder = tmp_path / "checkpoints"
    run_ranks(save, 3, folder, 4)
    before = verify_run(tmp_path, digest=True)

    def fail(world: World) -> str:
        if world.rank == failing:
            write = store.write_file

            def blocked(staging: Path, file: str, data: bytes) -> FileEntry:
                (staging / file).mkdir()  # a folder in place of the file, because root ignores permissions
                return write(staging, file, data)

            store.write_file = blocked
        return told(lambda: save(world, folder, 5))

    messages = run_ranks(fail, 3)
    assert len(set(messages)) == 1
    assert f"rank {failing}: [Errno 17] File exists" in messages[0] and "free space" in messages[0]
    assert [path.name for path in folder.iterdir()] == ["step-00000004"]
    assert verify_run(tmp_path, digest=True) == before


def test_a_rank_that_fails_in_an_unforeseen_way_leaves_nobody_waiting(tmp_path: Path) -> None:
    def fail(world: World) -> str:
        saver = Saver(tmp_path / "checkpoints", world)
        files: Any = shard(world.rank, world.size, 1)
        if world.rank == 1:
            files[particle_file(1)] = {"param/grid0": "not a tensor"}
        return told(lambda: saver.begin(1, files, {}, METADATA))

    messages = run_ranks(fail, 2)
    assert messages[0] == messages[1] and "rank 1: AttributeError" in messages[0]
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda files, health: files.update({"../outside.safetensors": {}}), "is not the name of a file"),
        (lambda files, health: files.update({particle_file(0): {}}), "which rank 0 holds too"),
        (lambda files, health: health.update({1: {"worst": float("nan")}}), "not JSON"),
        (lambda files, health: health.update({1: {"worst": torch.ones(1)}}), "not JSON serializable"),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_refused_on_all_ranks(tmp_path: Path, change: Any, said: str) -> None:
    def fail(world: World) -> str:
        saver = Saver(tmp_path / "checkpoints", world)
        files, health = shard(world.rank, world.size, 1), {}
        if world.rank == 1:
            change(files, health)
        return told(lambda: saver.begin(1, files, {}, METADATA, health))

    messages = run_ranks(fail, 2)
    assert messages[0] == messages[1] and said in messages[0]
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_only_errors_of_disks_are_counted_and_survived(tmp_path: Path) -> None:
    """If one rank's disk fails and another rank's state is invalid, the save raises. It does not count as a failed
    save."""

    def fail(world: World) -> tuple[str, int]:
        saver = Saver(tmp_path / "checkpoints", world, max_failures=9)
        files: Any = shard(world.rank, world.size, 1)
        with injected("enospc@save.stage:rank=0"):
            saver.begin(1, files, {}, METADATA)
            counted = saver.failures
            if world.rank == 1:
                files[particle_file(1)] = {"param/grid0": None}
            return told(lambda: saver.begin(1, files, {}, METADATA)), counted

    messages = run_ranks(fail, 2)
    assert messages[0] == messages[1] and messages[0][1] == 1
    assert "rank 0: [Errno 28]" in messages[0][0] and "rank 1: AttributeError" in messages[0][0]


def test_ranks_at_different_steps_do_not_save(tmp_path: Path) -> None:
    def fail(world: World) -> str:
        saver = Saver(tmp_path / "checkpoints", world)
        return told(lambda: saver.begin(1 + world.rank, shard(world.rank, world.size, 1), {}, METADATA))

    messages = run_ranks(fail, 2)
    assert all("rank 1: is at step 2 and rank 0 at 1" in message for message in messages)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_replicas_are_written_once_and_drift_between_them_is_found(tmp_path: Path) -> None:
    def replicated(world: World, drift: float) -> str:
        saver = Saver(tmp_path / "checkpoints", world)
        files = shard(world.rank, world.size, 1)
        files[SCORE] = {"lora_A": torch.ones(4) + (drift if world.rank == 2 else 0)}
        return told(lambda: saver.begin(1, files, {"score/adapter_config.json": "{}"}, METADATA))

    assert run_ranks(replicated, 3, 0.0) == ["no error"] * 3
    before = verify_run(tmp_path, digest=True)
    messages = run_ranks(replicated, 3, 1e-7)
    assert len(set(messages)) == 1 and f"rank 2: holds another {SCORE} than rank 0" in messages[0]
    assert verify_run(tmp_path, digest=True) == before


def test_missing_metadata_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    def fail(world: World) -> str:
        saver = Saver(tmp_path / "checkpoints", world)
        return told(lambda: saver.begin(1, shard(world.rank, world.size, 1), {}, {"config": {}}))

    messages = run_ranks(fail, 2)
    assert messages[0] == messages[1] and "lacks config_digest, prior_identity, metrics_bytes" in messages[0]
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.guarantee("G4")
def test_all_ranks_fall_back_to_the_newest_sound_checkpoint(tmp_path: Path) -> None:
    """All ranks fall back to the newest checkpoint that every rank finds sound."""
    run_ranks(save, 2, tmp_path / "checkpoints", 4, 5, 6)
    draw = random.Random(0)
    for path in (
        tmp_path / "checkpoints/step-00000006" / particle_file(5),
        tmp_path / "checkpoints/step-00000005" / SCORE,
    ):
        data = bytearray(path.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)

    def load(world: World) -> tuple[int | None, str]:
        saver = Saver(tmp_path / "checkpoints", world)
        checkpoint = saver.load()
        return checkpoint and checkpoint.manifest.step, told(lambda: saver.load(6))

    results = run_ranks(load, 3)
    assert len(set(results)) == 1
    step, message = results[0]
    assert step == 4
    assert message.startswith("step-00000006 cannot be used") and "000005.safetensors does not match" in message


@pytest.mark.guarantee("G4")
def test_loading_without_a_usable_checkpoint_says_so_on_all_ranks(tmp_path: Path) -> None:
    """If all checkpoints are damaged, a run does not start from the beginning. The error is the same on all ranks."""

    def load(world: World, step: int | None) -> str:
        return told(lambda: Saver(tmp_path / "checkpoints", world).load(step))

    assert run_ranks(load, 2, None) == ["no error"] * 2
    run_ranks(save, 2, tmp_path / "checkpoints", 4)
    assert all("holds no step-00000009; there are: step-00000004" in text for text in run_ranks(load, 2, 9))
    (tmp_path / "checkpoints/step-00000004/manifest.json").write_text("{}")
    messages = run_ranks(load, 2, None)
    assert messages[0] == messages[1] and "none of the 1 checkpoints" in messages[0]


def test_an_unfinished_save_of_a_dead_run_is_cleared_away_by_the_next(tmp_path: Path) -> None:
    run_ranks(save, 2, tmp_path / "checkpoints", 4)
    store.stage(tmp_path / "checkpoints", 5)
    run_ranks(save, 2, tmp_path / "checkpoints", 5)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000004", "step-00000005"]


def test_a_save_on_demand_holds_the_tensors_of_one_file_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def fetched(particle: int) -> dict[str, Tensor]:
        nonlocal most
        state = {"param/grid0": torch.full((8,), float(particle))}
        alive.append(weakref.ref(state["param/grid0"]))
        most = max(most, sum(tensor() is not None for tensor in alive))
        return state

    for count in (4, 40):
        alive.clear()
        most = 0
        files = OnDemand({particle_file(own): functools.partial(fetched, own) for own in range(count)})
        saver = Saver(tmp_path / str(count), World(0, 1, 0, 1, torch.device("cpu")))
        saver.begin(1, files, {}, METADATA)
        assert len(alive) == count and most == 1
        checkpoint = saver.load()
        assert checkpoint is not None
        assert (checkpoint.read(particle_file(3))["param/grid0"] == 3).all()
