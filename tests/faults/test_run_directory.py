"""Run directories in which something else is in the place of a file: a link, a pipe, a folder or another file.

A small run is trained, rendered and evaluated once. Then each file and folder that it leaves is replaced in turn.
"""

from __future__ import annotations

import logging
import os
import re
import resource
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from distvsd.cli import main
from tests.fuzz.harness import limited
from tests.small_run import SMOKE, overrides

ROOT = Path(__file__).parents[2]
KINDS = ("link", "dangling", "pipe", "other")
COMMANDS = ("train", "render", "evaluate", "verify", "log", "export")
OPTIONS = {"export": ("--texture", "0", "--resolution", "12")}  # what takes least time
# The files and folders that each command reads or writes, with everything inside the folders.
USED = {
    "train": "STATUS.json config.yaml metrics.jsonl health.jsonl run.lock evaluation.json heartbeats checkpoints wandb "
    "renders profile",
    "render": "config.yaml checkpoints renders",
    "evaluate": "config.yaml checkpoints evaluation.json",
    "verify": "config.yaml checkpoints",
    "export": "config.yaml checkpoints exports",
    "log": "config.yaml metrics.jsonl health.jsonl evaluation.json renders wandb.json wandb",
}
UNUSED = {"train": r"wandb/|renders/.*mp4", "render": r"renders/round"}  # exceptions from USED
# Errors with images and telemetry do not end a run, and an unsound checkpoint is skipped. A warning names the path.
LENIENT = ("renders/", "profile/", "wandb", "checkpoints/")
Said = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def settings(prior: Path) -> list[str]:
    changes = {"particles.count": 1, "schedule.rounds": 2, "checkpoint.every": 1, "log.every": 1, "log.images_every": 1}
    changes |= {"log.profile": 1}
    return overrides(Path("RUN"), prior, **changes)[1:]


@pytest.fixture(scope="module", autouse=True)
def few_frames_and_no_real_wandb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distvsd.looking.render.FRAMES", 2)
        patch.setenv("PYTHONPATH", str(ROOT / "tests/fakes"))  # for the process that imports wandb
        patch.setenv("FAKE_WANDB_CALLS", str(tmp_path_factory.mktemp("wandb") / "calls.jsonl"))
        for name in ("WANDB_RUN_ID", "WANDB_MODE", "FAKE_WANDB"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> Path:
    """A run that was rendered, evaluated and logged, in the state after a kill in its second round. Tests copy it."""
    run = tmp_path_factory.mktemp("killed") / "run"
    assert main(["train", str(SMOKE), f"run.dir={run}", *settings]) == 0
    for command in COMMANDS[1:]:
        assert main([command, str(run), *OPTIONS.get(command, ())]) == 0
    shutil.rmtree(run / "checkpoints/step-00000002")
    dead = subprocess.Popen([sys.executable, "-S", "-c", ""])
    dead.wait()
    (run / "run.lock").write_text(f"{socket.gethostname()}:{dead.pid}")
    (run / "heartbeats").mkdir()
    for rank in (0, 7):  # the next run has fewer ranks and deletes the file of rank 7
        (run / f"heartbeats/rank-{rank:05d}.json").write_text("{}")
    return run


@pytest.fixture
def run(tmp_path: Path, killed: Path) -> Path:
    return shutil.copytree(killed, tmp_path / "run", symlinks=True)


@pytest.fixture
def said(settings: list[str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Said:
    """Runs a command on a run directory. Returns its exit code and its output, including the log."""

    def call(command: str, run: Path, *more: str) -> tuple[int, str]:
        capsys.readouterr(), caplog.clear()
        target = [str(SMOKE), f"run.dir={run}", *settings] if command == "train" else [str(run)]
        with limited(40.0), caplog.at_level(logging.WARNING):
            code = main([command, *target, *OPTIONS.get(command, ()), *more])
        out, err = capsys.readouterr()
        return code, out + err + caplog.text

    return call


def names_of(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if "wandb/run" not in str(path))


def replace(path: Path, kind: str, outside: Path) -> None:
    """Replaces a file or folder. A link points to the original content, so code that follows it works as before."""
    was_folder = path.is_dir() and not path.is_symlink()
    if kind == "link":
        shutil.move(path, outside / path.name)
        path.symlink_to(outside / path.name)
        return
    shutil.rmtree(path) if was_folder else path.unlink()
    if kind == "dangling":
        path.symlink_to(outside / "absent" / path.name if was_folder else outside / f"absent-{path.name}")
    elif kind == "pipe":
        os.mkfifo(path)
    elif was_folder:
        path.write_text("mine")
    else:
        path.mkdir()
        (path / "mine").write_text("mine")


def content(folder: Path) -> dict[str, bytes | str]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if stat.S_ISREG(path.lstat().st_mode) else "not a file"
        for path in folder.rglob("*")
    }


def uses(command: str, name: str) -> bool:
    return name.split("/")[0] in USED[command].split() and not re.match(UNUSED.get(command, "$"), name)


def cases(run: Path, command: str, kind: str) -> Iterator[str]:
    """The names to replace for a command. `train` runs the second round again."""
    for number, name in enumerate(names_of(run)):
        if "round-00000001" in name or name.endswith("rank-00007.json"):
            continue  # the files of the second round and of rank 0 stand for these
        if not uses(command, name) or (command == "log" and kind == "other" and "." not in name.rpartition("/")[2]):
            continue  # without a folder of images `log` sends none
        # Only a share of the names, because a training takes a second. tests/unit/checkpoint replaces each checkpoint
        # file.
        share = 8 if name.startswith("checkpoints/") else 3 if command == "train" and name.startswith("renders/") else 1
        if (number + KINDS.index(kind) + COMMANDS.index(command)) % share == 0:
            yield name


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "precious").write_text("precious")
    return folder


def test_a_run_leaves_the_names_that_are_tried_here(killed: Path) -> None:
    top = {name for name in names_of(killed) if "/" not in name}
    assert top == set(" ".join(USED.values()).split())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_that_took_the_place_of_a_file_is_followed_waited_for_or_overlooked(
    killed: Path, tmp_path: Path, said: Said, command: str, kind: str
) -> None:
    """Replaces each file and folder that a command uses. Nothing outside changes, and a message names the path."""
    for name in cases(killed, command, kind):
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            run, outside = shutil.copytree(killed, Path(folder) / "run"), Path(folder) / "outside"
            outside.mkdir()
            replace(run / name, kind, outside)
            before = content(outside)
            code, text = said(command, run)
            assert content(outside) == before, f"{command} with {name} as {kind} changed what is outside"
            named = str(run / name) if not name.startswith("checkpoints/") else "/".join(name.split("/")[:2])
            assert named in text, (name, code, text)
            assert code == 1 or (code == 0 and name.startswith(LENIENT)), (name, code, text)


@pytest.mark.parametrize("command", COMMANDS[1:])
def test_what_a_command_does_not_use_may_be_anything(
    killed: Path, run: Path, outside: Path, said: Said, command: str
) -> None:
    for name in [name for name in names_of(killed) if "/" not in name and not uses(command, name)]:
        replace(run / name, "pipe" if name.endswith(".jsonl") else "link", outside)
    before = content(outside)
    code, text = said(command, run)
    assert code == 0, text
    assert content(outside) == before


def test_the_run_directory_itself_may_be_reached_through_a_link(run: Path, said: Said, tmp_path: Path) -> None:
    (tmp_path / "short").symlink_to(run)
    for command in COMMANDS:
        code, text = said(command, tmp_path / "short")
        assert code == 0, text


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Limits the size of files, so that larger writes fail as on a full disk. Do not use it while the output goes to a
    file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("command", ["render", "evaluate", "export"])
def test_a_full_disk_is_said_and_leaves_what_was_there(run: Path, said: Said, command: str) -> None:
    before = content(run)
    with files_of_at_most(100):
        code, text = said(command, run)
    assert code == 1 and "cannot be written" in text and str(run) in text
    assert content(run) == before


@pytest.mark.parametrize("command", ["render", "evaluate", "export"])
def test_a_run_directory_that_may_not_be_written_to_is_said_before_the_work(
    killed: Path, said: Said, command: str
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        run = shutil.copytree(killed, Path(folder) / "run")
        run.chmod(0o555)
        mine = os.geteuid()
        if mine == 0:  # permissions do not restrict root
            os.seteuid(65534)
        try:
            code, text = said(command, run)
        finally:
            os.seteuid(mine)
        run.chmod(0o755)
    assert code == 1 and "cannot be written" in text and str(run) in text


def test_a_lock_of_any_bytes_is_a_lock_that_somebody_holds(run: Path, said: Said) -> None:
    (run / "run.lock").write_bytes(b"\xff\xfe\x80 not text")
    shutil.rmtree(run / "heartbeats")  # old heartbeats would show that the holder is dead
    code, text = said("train", run)
    assert code == 1 and "run.lock" in text and "delete the file" in text
    assert (run / "run.lock").read_bytes() == b"\xff\xfe\x80 not text"


DAMAGES: dict[str, Callable[[Path], object]] = {
    "not UTF-8": lambda path: path.write_bytes(b"prompt: \xff\xfe\n"),
    "not YAML": lambda path: path.write_text("a: [1\n"),
    "not a configuration": lambda path: path.write_text("particles: 3\n"),
    "empty": lambda path: path.write_text(""),
    "missing": lambda path: path.unlink(),
    "with more particles": lambda path: path.write_text(path.read_text().replace("  count: 1\n", "  count: 2\n")),
    "with larger particles": lambda path: path.write_text(path.read_text().replace("features: 3", "features: 2")),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_damaged_config_yaml_is_named(run: Path, said: Said, command: str, damage: str) -> None:
    before = (run / "config.yaml").read_bytes()
    DAMAGES[damage](run / "config.yaml")
    assert not (run / "config.yaml").exists() or (run / "config.yaml").read_bytes() != before
    foreign = damage.startswith("with ")
    code, text = said(command, run)
    if (command == "log" and foreign) or (command in ("train", "verify") and damage == "missing"):
        assert code == 0, text  # `log` reads no particles; `train` and `verify` do not need the file
    else:
        assert str(run) in text and ("config.yaml" in text or "another configuration" in text), text
        assert code in (1, 2) or (command == "verify" and damage == "with larger particles"), text


@pytest.mark.parametrize("command", ["render", "evaluate", "verify", "export"])
def test_the_config_yaml_of_a_run_with_another_prompt_is_a_warning(run: Path, said: Said, command: str) -> None:
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("a red cube", "a blue cone"))
    code, text = said(command, run)
    assert code == 0 and str(path) in text and "prompt" in text
    path.write_text(path.read_text().replace("a blue cone", "a red cube"))
    code, text = said(command, run)
    assert code == 0 and str(path) not in text
