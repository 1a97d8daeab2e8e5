"""What lies on the disk is published whole or not at all, and nothing damaged is ever taken for sound."""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distvsd.checkpoint import Saver, newest, open_checkpoint, store, verify_run
from distvsd.checkpoint.format import FileEntry, Manifest, NewerFormatError
from distvsd.checkpoint.reader import steps
from distvsd.errors import CheckpointError
from distvsd.parallel.world import World

Save = Callable[..., Path]


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_the_layout_is_the_documented_one(save: Save) -> None:
    folder = save(1200)
    assert folder.name == "step-00001200"
    assert [str(path.relative_to(folder)) for path in files_of(folder)] == [
        "manifest.json",
        "particles/000000.safetensors",
        "particles/000001.safetensors",
        "particles/000002.safetensors",
        "score/adapter_config.json",
        "score/adapter_model.safetensors",
        "score/camera.safetensors",
        "score/optimizer.safetensors",
        "score/replay.safetensors",
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["step-00001200"]


def test_a_random_flipped_bit_in_any_file_is_found_by_every_reader(save: Save, tmp_path: Path) -> None:
    folder = save(5)
    draw = random.Random(0)
    flips = 0
    for path in files_of(folder):
        sound = path.read_bytes()
        for _ in range(40):
            data = bytearray(sound)
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            path.write_bytes(data)
            with pytest.raises(CheckpointError, match=path.name):
                verify_run(tmp_path)
            flips += 1
        with pytest.raises(CheckpointError, match=path.name):
            newest(folder.parent)
        name = str(path.relative_to(folder))
        if name != "manifest.json":
            checkpoint = open_checkpoint(folder.parent, 5)
            with pytest.raises(CheckpointError, match=path.name):
                (checkpoint.read_text if name.endswith(".json") else checkpoint.read)(name)
        path.write_bytes(sound)
    assert flips >= 200
    assert newest(folder.parent) is not None


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _link(path: Path) -> None:
    copy = path.parents[3] / "copy"
    shutil.move(path, copy)
    path.symlink_to(copy)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [_truncate, _empty, _lengthen, Path.unlink, _link, _folder, _pipe])
@pytest.mark.parametrize("file", ["particles/000001.safetensors", "score/adapter_config.json", "manifest.json"])
def test_damaged_files_are_named_with_what_to_do(
    save: Save, tmp_path: Path, damage: Callable[[Path], object], file: str
) -> None:
    folder = save(5)
    damage(folder / file)
    with pytest.raises(CheckpointError, match=f"{Path(file).name}.*restore it from a copy"):
        verify_run(tmp_path)
    if file != "manifest.json":
        checkpoint = open_checkpoint(folder.parent, 5)
        with pytest.raises(CheckpointError, match=Path(file).name):
            checkpoint.read_text(file) if file.endswith(".json") else checkpoint.read(file)


def test_a_folder_that_became_a_link_is_not_followed(save: Save, tmp_path: Path) -> None:
    folder = save(5)
    shutil.move(folder / "particles", tmp_path / "elsewhere")
    (folder / "particles").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="particles is a symbolic link"):
        verify_run(tmp_path)
    with pytest.raises(CheckpointError, match="symbolic link"):
        open_checkpoint(folder.parent, 5).read("particles/000001.safetensors")
    shutil.move(folder, tmp_path / "all")
    folder.symlink_to(tmp_path / "all")
    with pytest.raises(CheckpointError, match="step-00000005 is a symbolic link"):
        verify_run(tmp_path)


@pytest.mark.parametrize("extra", ["note.txt", "particles/000009.safetensors", "score/deep/x.json", ".hidden"])
def test_a_file_the_manifest_does_not_name_is_reported(save: Save, tmp_path: Path, extra: str) -> None:
    path = save(5) / extra
    path.parent.mkdir(exist_ok=True)
    path.write_text("?")
    with pytest.raises(CheckpointError, match=f"{path.name} is not named in the manifest"):
        verify_run(tmp_path)


def test_a_file_the_manifest_does_not_name_is_never_read(save: Save, tmp_path: Path) -> None:
    folder = save(5)
    shutil.copy(folder / "particles/000001.safetensors", folder / "particles/000009.safetensors")
    with pytest.raises(CheckpointError, match="holds no particles/000009"):
        open_checkpoint(folder.parent, 5).read("particles/000009.safetensors")
    with pytest.raises(CheckpointError, match="holds no"):
        open_checkpoint(folder.parent, 5).read("../../secret.safetensors")


def test_all_problems_of_all_checkpoints_are_told_at_once(save: Save, tmp_path: Path) -> None:
    folder = save(5, 6)
    _truncate(folder / "particles/000000.safetensors")
    (folder / "score/camera.safetensors").unlink()
    (tmp_path / "checkpoints/step-00000005/manifest.json").unlink()
    with pytest.raises(CheckpointError, match="3 problems in the 2 checkpoints") as caught:
        verify_run(tmp_path)
    assert all(
        name in str(caught.value) for name in ("000000.safetensors", "camera.safetensors", "step-00000005/manifest")
    )


def test_a_renamed_checkpoint_is_not_taken_for_another_step(save: Save, tmp_path: Path) -> None:
    folder = save(5)
    folder.rename(folder.with_name("step-00000009"))
    with pytest.raises(CheckpointError, match="is of step 5: the folder was renamed"):
        verify_run(tmp_path)


def test_names_that_only_look_like_checkpoints_are_ignored(save: Save, tmp_path: Path) -> None:
    folder = save(5)
    for name in (
        "step-9",
        "old-step-00000009",
        "step-00000009.bak",
        ".staged-step-00000009-ab",
        ".replaced-step-00000009-a",
    ):
        shutil.copytree(folder, folder.with_name(name))
    assert steps(folder.parent) == [5]
    found = newest(folder.parent)
    assert found is not None and found.manifest.step == 5
    assert len(verify_run(tmp_path)) == 1


def test_no_checkpoint_is_none_and_only_unsound_ones_are_an_error(save: Save, tmp_path: Path) -> None:
    assert newest(tmp_path / "checkpoints") is None
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        verify_run(tmp_path)
    (save(5) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        newest(tmp_path / "checkpoints")


def test_the_newest_sound_checkpoint_is_used_and_the_skipped_one_named(
    save: Save, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(5, 6, 7)
    _truncate(folder / "particles/000002.safetensors")
    (folder.with_name("step-00000006") / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        found = newest(folder.parent)
    assert found is not None and found.manifest.step == 5
    assert [("00000007" in text, "00000006" in text) for text in caplog.messages] == [(True, False), (False, True)]


def test_a_newer_format_is_refused_and_not_skipped(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(5)
    with monkeypatch.context() as patch:
        patch.setattr("distvsd.checkpoint.format.FORMAT", 2)
        save(6)
    with pytest.raises(NewerFormatError, match="upgrade"):
        newest(folder.parent)


def test_an_occupied_slot_is_replaced_as_a_whole(save: Save, tmp_path: Path) -> None:
    save(5, particles=4)
    folder = save(5, particles=2)
    assert sorted(path.name for path in (folder / "particles").iterdir()) == [
        "000000.safetensors",
        "000001.safetensors",
    ]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert verify_run(tmp_path) == [
        "step-00000005 sound: 2 particles, 7 files, "
        f"{sum(path.stat().st_size for path in files_of(folder) if path.name != 'manifest.json')} bytes"
    ]


def test_a_failed_rename_gives_the_slot_back(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(5)
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name.startswith(".staged"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save(5, particles=1)
    monkeypatch.undo()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert len(verify_run(tmp_path)) == 1


@pytest.mark.parametrize("after", range(1, 11))
def test_a_save_that_dies_after_any_write_leaves_the_checkpoints_as_they_were(
    save: Save, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """After k writes of 9 files the save stops as by a kill: nothing behind it runs, not even its cleaning up."""
    before = verify_run(tmp_path, digest=True) if save(5) else []
    write, count = store.write_file, 0

    def dying(staging: Path, file: str, data: bytes) -> FileEntry:
        nonlocal count
        count += 1
        if count == after:
            (staging / file).write_bytes(data[: len(data) // 2])
            raise KeyboardInterrupt
        return write(staging, file, data)

    def publish_and_die(staging: Path, manifest: Manifest) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_file", dying)
        patch.setattr(store, "discard", lambda folder: None)
        if after == 10:
            patch.setattr(store, "publish", publish_and_die)
        with pytest.raises(KeyboardInterrupt):
            save(6)
    leftovers = [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".staged")]
    assert len(leftovers) == 1
    assert verify_run(tmp_path, digest=True) == before
    Saver(tmp_path / "checkpoints", world)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]


def test_a_checkpoint_swapped_aside_by_a_run_that_died_comes_back(save: Save, world: World, tmp_path: Path) -> None:
    folder = save(5)
    digest = verify_run(tmp_path, digest=True)
    folder.rename(folder.with_name(".replaced-step-00000005-0123"))
    assert newest(folder.parent) is None
    store.recover(folder.parent)
    assert verify_run(tmp_path, digest=True) == digest
    shutil.copytree(folder, folder.with_name(".replaced-step-00000005-4567"))
    store.recover(folder.parent)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_only_the_newest_complete_checkpoints_stay(save: Save, tmp_path: Path) -> None:
    save(1, 2, 3, 4, keep=2)
    assert steps(tmp_path / "checkpoints") == [4, 3]


def test_a_damaged_checkpoint_does_not_count_as_kept(save: Save, tmp_path: Path) -> None:
    folder = save(1, 2, 3)
    _truncate(folder / "particles/000000.safetensors")
    save(4, keep=2)
    assert steps(tmp_path / "checkpoints") == [4, 3, 2]


def test_the_checkpoint_just_published_is_never_pruned(save: Save, tmp_path: Path) -> None:
    save(100, 200)
    save(50, keep=1)
    assert steps(tmp_path / "checkpoints") == [200, 50]


def test_a_failed_delete_is_a_warning(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(folder: Path) -> None:
        raise OSError(13, "Permission denied")

    save(1, 2)
    monkeypatch.setattr(shutil, "rmtree", fail)
    save(3, keep=1)
    assert steps(tmp_path / "checkpoints") == [3]
    assert "Permission denied" in caplog.text


def test_pruning_waits_for_the_publication(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(1, 2)
    monkeypatch.setattr(
        store, "sync_folder", lambda folder: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(CheckpointError, match=r"No space left.*free space"):
        save(3, keep=1)
    monkeypatch.undo()
    assert steps(tmp_path / "checkpoints") == [2, 1]


def test_a_vanished_file_is_noticed_before_the_manifest_is_written(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = store.write_file

    def elsewhere(staging: Path, file: str, data: bytes) -> FileEntry:
        entry = write(staging, file, data)
        if file == "particles/000001.safetensors":
            (staging / file).unlink()  # as if this rank's folder were on its own machine
        return entry

    monkeypatch.setattr(store, "write_file", elsewhere)
    with pytest.raises(CheckpointError, match=r"000001.safetensors is missing.*every rank shares"):
        save(5)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_reading_gives_back_what_was_saved(
    save: Save, state: Callable[..., dict[str, dict[str, torch.Tensor]]]
) -> None:
    checkpoint = newest(save(5).parent)
    assert checkpoint is not None
    for file, tensors in state(3, 5).items():
        read = checkpoint.read(file)
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in read)
    assert checkpoint.read_text("score/adapter_config.json") == '{"r": 4, "lora_alpha": 4}'
