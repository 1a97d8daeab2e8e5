"""A checkpoint is published whole or not at all, and a damaged one is never taken for sound."""

from __future__ import annotations

import logging
import os
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distvsd.checkpoint import newest, open_checkpoint, store, verify_run
from distvsd.checkpoint.format import FileEntry, NewerFormatError
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


@pytest.mark.guarantee("G3")
def test_a_random_flipped_bit_in_any_file_is_found_by_every_reader(
    save: Save, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    """A flipped bit in any file of a checkpoint is found before any tensor of it is used."""
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
                checkpoint.read(name)
        path.write_bytes(sound)
    assert flips >= 200
    assert newest(folder.parent) is not None
    figure(f"{flips} of {flips} random flipped bits found, in every kind of file")


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


@pytest.mark.guarantee("G3")
@pytest.mark.parametrize("damage", [_truncate, _empty, _lengthen, Path.unlink, _link, _folder, _pipe])
@pytest.mark.parametrize("file", ["particles/000001.safetensors", "score/adapter_config.json", "manifest.json"])
def test_damaged_files_are_named_with_what_to_do(
    save: Save, tmp_path: Path, damage: Callable[[Path], object], file: str
) -> None:
    """A file that was cut, emptied, lengthened, deleted, or replaced by a link, folder or pipe is found and named."""
    folder = save(5)
    damage(folder / file)
    with pytest.raises(CheckpointError, match=f"{Path(file).name}.*restore"):
        verify_run(tmp_path)
    if file != "manifest.json":
        checkpoint = open_checkpoint(folder.parent, 5)
        with pytest.raises(CheckpointError, match=Path(file).name):
            checkpoint.read(file)


@pytest.mark.guarantee("G32")
def test_a_folder_that_became_a_link_is_not_followed(save: Save, tmp_path: Path) -> None:
    """A link in a checkpoint is never followed out of it."""
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


@pytest.mark.guarantee("G3")
@pytest.mark.parametrize("extra", ["note.txt", "particles/000009.safetensors", "score/deep/x.json", ".hidden"])
def test_a_file_the_manifest_does_not_name_is_reported(save: Save, tmp_path: Path, extra: str) -> None:
    """A file that a checkpoint's manifest does not name is reported."""
    path = save(5) / extra
    path.parent.mkdir(exist_ok=True)
    path.write_text("?")
    with pytest.raises(CheckpointError, match=f"{path.name} is not named"):
        verify_run(tmp_path)


@pytest.mark.guarantee("G32")
def test_a_file_the_manifest_does_not_name_is_never_read(save: Save, tmp_path: Path) -> None:
    """Nothing is read from a checkpoint but what its manifest names."""
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
    with pytest.raises(CheckpointError, match="of step 5"):
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


@pytest.mark.guarantee("G4")
def test_no_checkpoint_is_none_and_only_unsound_ones_are_an_error(save: Save, tmp_path: Path) -> None:
    """Where checkpoints exist and none is sound, a run does not start anew: it is an error."""
    assert newest(tmp_path / "checkpoints") is None
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        verify_run(tmp_path)
    (save(5) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        newest(tmp_path / "checkpoints")


@pytest.mark.guarantee("G4")
def test_the_newest_sound_checkpoint_is_used_and_the_skipped_one_named(
    save: Save, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Damaged checkpoints are passed over for the newest sound one, each with a warning that names it."""
    folder = save(5, 6, 7)
    _truncate(folder / "particles/000002.safetensors")
    (folder.with_name("step-00000006") / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        found = newest(folder.parent)
    assert found is not None and found.manifest.step == 5
    assert [("00000007" in text, "00000006" in text) for text in caplog.messages] == [(True, False), (False, True)]


@pytest.mark.guarantee("G36")
def test_a_newer_format_is_refused_and_not_skipped(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of a newer format is refused with advice, and not skipped for an older one."""
    folder = save(5)
    with monkeypatch.context() as patch:
        patch.setattr("distvsd.checkpoint.format.FORMAT", 2)
        save(6)
    with pytest.raises(NewerFormatError, match="upgrade"):
        newest(folder.parent)


@pytest.mark.guarantee("G2")
def test_an_occupied_slot_is_replaced_as_a_whole(save: Save, tmp_path: Path) -> None:
    """A save of an occupied step replaces the checkpoint there as a whole, and mixes no file of it in."""
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


@pytest.mark.guarantee("G2")
def test_a_failed_rename_gives_the_slot_back(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save of an occupied step that cannot take its place leaves the old checkpoint there."""
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


@pytest.mark.guarantee("G6")
def test_only_the_newest_complete_checkpoints_stay(save: Save, tmp_path: Path) -> None:
    """Of the complete checkpoints the newest `checkpoint.keep` stay."""
    save(1, 2, 3, 4, keep=2)
    assert steps(tmp_path / "checkpoints") == [4, 3]


@pytest.mark.guarantee("G6")
def test_a_damaged_checkpoint_does_not_count_as_kept(save: Save, tmp_path: Path) -> None:
    """A damaged checkpoint is not counted among those that stay."""
    folder = save(1, 2, 3)
    _truncate(folder / "particles/000000.safetensors")
    save(4, keep=2)
    assert steps(tmp_path / "checkpoints") == [4, 3, 2]


def test_the_checkpoint_just_published_is_never_pruned(save: Save, tmp_path: Path) -> None:
    save(100, 200, 300)
    save(50, keep=2)
    assert steps(tmp_path / "checkpoints") == [300, 200, 50]


@pytest.mark.guarantee("G6")
def test_a_failed_delete_is_a_warning(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An old checkpoint that cannot be deleted causes a warning and no failed save."""

    def fail(folder: Path) -> None:
        raise OSError(13, "Permission denied")

    save(1, 2, 3)
    monkeypatch.setattr(shutil, "rmtree", fail)
    save(4, keep=2)
    assert steps(tmp_path / "checkpoints") == [4, 3]
    assert "Permission denied" in caplog.text


@pytest.mark.guarantee("G6")
def test_pruning_waits_for_the_publication(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No old checkpoint is deleted unless the new one was published."""
    save(1, 2, 3)
    monkeypatch.setattr(
        store, "sync_folder", lambda folder: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(CheckpointError, match=r"No space left.*free space"):
        save(4, keep=2)
    monkeypatch.undo()
    assert steps(tmp_path / "checkpoints") == [3, 2, 1]


@pytest.mark.guarantee("G6")
@pytest.mark.parametrize("occupied", [False, True])
def test_a_checkpoint_that_cannot_be_verified_in_its_place_is_taken_back(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, occupied: bool
) -> None:
    """Old checkpoints are deleted only after the new one was verified in its place; if damaged there, it is removed."""
    save(1, 2, 3)
    new = 3 if occupied else 4
    before = verify_run(tmp_path, digest=True)
    sync = store.sync_folder

    def lossy(folder: Path) -> None:
        sync(folder)
        if folder.name == "checkpoints":
            _truncate(folder / f"step-{new:08d}/particles/000000.safetensors")

    with monkeypatch.context() as patch:
        patch.setattr(store, "sync_folder", lossy)
        with pytest.raises(CheckpointError, match=r"published.*000000"):
            save(new, particles=1, keep=2)
    assert verify_run(tmp_path, digest=True) == before
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        "step-00000001",
        "step-00000002",
        "step-00000003",
    ]


@pytest.mark.guarantee("G6")
def test_a_disk_that_gives_back_other_bytes_than_it_was_given_is_noticed(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file is read back from the disk before its checkpoint is published."""
    save(1)
    sync = os.fsync

    def lossy(handle: int) -> None:
        sync(handle)
        path = Path(f"/proc/self/fd/{handle}").readlink()
        if path.name == "camera.safetensors":
            with path.open("r+b") as stream:
                stream.seek(-1, os.SEEK_END)
                stream.write(b"\xff")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lossy)
        with pytest.raises(CheckpointError, match=r"other bytes.*camera.safetensors"):
            save(2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("thing", ["file", "link", "folder"])
def test_whatever_lies_in_a_checkpoints_place_makes_room(save: Save, tmp_path: Path, thing: str) -> None:
    place = save(4).with_name("step-00000005")
    match thing:
        case "file":
            place.write_text("?")
        case "link":
            place.symlink_to(tmp_path)
        case "folder":
            (place / "particles").mkdir(parents=True)
    save(5)
    assert [path.name for path in sorted(place.parent.iterdir())] == ["step-00000004", "step-00000005"]
    assert len(verify_run(tmp_path)) == 2


def test_fewer_than_two_checkpoints_are_not_kept(save: Save) -> None:
    with pytest.raises(CheckpointError, match="at least 2"):
        save(1, keep=1)


@pytest.mark.guarantee("G5")
def test_a_run_whose_checkpoints_cannot_fit_is_refused_before_it_starts(save: Save, tmp_path: Path) -> None:
    """Before the first round it is proved that the disk has room for the run's checkpoints."""
    folder = save(1).parent
    free = shutil.disk_usage(tmp_path).free
    store.reserve(folder, 2**20, keep=2)
    with pytest.raises(CheckpointError, match=rf"{2 * free} bytes .* 2 more.* \d+ are free"):
        store.reserve(folder, free, keep=2)  # one exists; two more must fit, because three exist while one is written
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
    try:
        with pytest.raises(CheckpointError, match=r"2097152 bytes.*\(File too large\)"):
            store.reserve(folder, 2**21, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]


def test_a_vanished_file_is_noticed_before_the_manifest_is_written(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = store.write_file

    def elsewhere(staging: Path, file: str, data: bytes) -> FileEntry:
        entry = write(staging, file, data)
        if file == "particles/000001.safetensors":
            (staging / file).unlink()  # as if this rank wrote to a disk of its own machine
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
    assert (checkpoint.folder / "score/adapter_config.json").read_text() == '{"r": 4, "lora_alpha": 4}'
