"""Mistakes of users, manipulated files and conflicting jobs, tested on whole trainings and their files."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import distvsd
from distvsd.checkpoint.reader import newest, open_checkpoint
from distvsd.config import Config, load_config
from distvsd.config.load import dotted_keys
from distvsd.errors import CheckpointError, ConfigError, RankError
from distvsd.faults import injected
from distvsd.parallel.world import World, open_world
from distvsd.run.train import train
from distvsd.testing.pipelines import tiny_pipeline
from distvsd.testing.ranks import run_ranks
from tests.small_run import TINY, refusals

Figure = Callable[[str], None]
ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "configs" / "smoke.yaml"
SMALL = {
    "particles.count": 2,
    **TINY,
    "schedule.rounds": 2,
    "checkpoint.every": 2,
    "score.rank": 2,
    "log.every": 1,
}
HOLDER = """
import sys, time
from pathlib import Path
from distvsd.runtime.paths import RunLock
RunLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, prior: Path) -> Path:
    """A finished run. Tests copy it before they change it."""
    config = training(tmp_path_factory.mktemp("finished") / "run", prior)
    run_ranks(lambda world: train(config), 1)
    return Path(config.run.dir)


def training(run: Path, prior: Path, **changes: Any) -> Config:
    settings = {"run.dir": run, "prior.path": prior} | SMALL
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return load_config(SMOKE, [f"{key}={value}" for key, value in settings.items()])


@pytest.mark.guarantee("G29")
def test_the_metrics_of_a_killed_and_resumed_run_have_every_round_once(
    tmp_path: Path, prior: Path, figure: Figure
) -> None:
    """After kill -9 and a resume, metrics.jsonl has every round once, in order; health.jsonl has every event once."""
    config = training(tmp_path / "run", prior, schedule__rounds=6)
    sick = "; ".join(f"nan@render:particle=1:step={step}" for step in (1, 4))
    with injected(f"{sick}; kill@round:step=5"), pytest.raises(RankError, match="exit code -9"):
        run_ranks(lambda world: train(config), 2)
    # No checkpoint holds round 5, so the resumed run writes its line again.
    assert rounds(config) == [1, 2, 3, 4, 5]
    with injected(sick):
        run_ranks(lambda world: train(config), 2)
    assert rounds(config) == [1, 2, 3, 4, 5, 6]
    events = [tuple(sorted(event.items())) for event in lines(config, "health.jsonl")]
    assert len(events) == len(set(events)) and len([event for event in events if "not finite" in str(event)]) == 2
    figure("rounds missing 0, twice 0")


def lines(config: Config, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.run.dir) / name).read_text().splitlines()]


def rounds(config: Config) -> list[int]:
    return [line["round"] for line in lines(config, "metrics.jsonl")]


@pytest.mark.guarantee("G30")
def test_every_key_with_a_letter_missing_is_refused_and_the_right_one_named(tmp_path: Path, figure: Figure) -> None:
    """Every misspelt key of the configuration is an error that names the file, the line and the intended key."""
    keys = [key for key in dotted_keys() if len(key.rpartition(".")[2]) > 3]
    caught = []
    for key in keys:
        *sections, name = key.split(".")
        for wrong in (name[:-2] + name[-1], name[:2] + name[3:], name + "s", name[1] + name[0] + name[2:]):
            if ".".join((*sections, wrong)) in dotted_keys():
                continue
            text = "\n".join("  " * depth + f"{part}:" for depth, part in enumerate((*sections, wrong)))
            path = tmp_path / "run.yaml"
            path.write_text(f"{text} 1\n", encoding="utf-8")
            with pytest.raises(ConfigError) as refusal:
                load_config(path)
            said = str(refusal.value)
            caught.append(f"run.yaml:{len(sections) + 1}" in said and f"did you mean {key}?" in said)
    assert len(caught) > 200 and all(caught), f"{caught.count(False)} of {len(caught)} misspellings"
    figure(f"{sum(caught)} of {len(caught)} misspelt keys refused with the key that was meant")


@pytest.mark.guarantee("G31")
def test_a_world_other_than_the_launcher_promised_is_refused_by_every_rank() -> None:
    """If the number of ranks differs from what the launcher promised, every rank refuses to train and names both
    numbers."""

    def open_with_wrong_promise(world: World) -> str:
        os.environ["WORLD_SIZE"] = "3"
        with pytest.raises(RankError) as refusal, open_world(5.0):
            pass
        return str(refusal.value)

    said = run_ranks(open_with_wrong_promise, 2)
    assert said[0] == said[1]
    assert "WORLD_SIZE is 3" in said[0] and "counts 2 ranks" in said[0]


def signed(manifest: dict[str, Any]) -> bytes:
    """The bytes of a manifest with any content, serialized and signed as docs/checkpoint-format.md says."""

    def spelt(content: dict[str, Any]) -> bytes:
        return json.dumps(content, sort_keys=True, indent=1, ensure_ascii=True).encode("ascii") + b"\n"

    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return spelt(content | {"sha256": hashlib.sha256(spelt(content)).hexdigest()})


OUTSIDE = ["../../outside.safetensors", "/etc/passwd", "particles/../../../outside.safetensors", "particles/./000000"]


@pytest.mark.guarantee("G32")
@pytest.mark.parametrize("name", [*OUTSIDE, "score/..\\outside.json", "particles/000000.safetensors\0", "score/a.pkl"])
def test_a_manifest_signed_by_a_stranger_cannot_name_a_file_outside(tmp_path: Path, finished: Path, name: str) -> None:
    """A hand-made manifest with a valid signature cannot cause a read outside its folder."""
    shutil.copytree(finished, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "step-00000002"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert signed(manifest) == (folder / "manifest.json").read_bytes(), "this test signs differently from the program"
    manifest["files"][name] = manifest["files"].pop("score/camera.safetensors")
    (folder / "manifest.json").write_bytes(signed(manifest))
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        open_checkpoint(tmp_path / "run" / "checkpoints", 2)
    with pytest.raises(CheckpointError):
        newest(tmp_path / "run" / "checkpoints")


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.guarantee("G32")
def test_code_in_the_files_of_a_checkpoint_never_runs(tmp_path: Path, finished: Path, figure: Figure) -> None:
    """Each file of a checkpoint is replaced by a pickle that runs code, and the manifest is signed again. No code
    runs."""
    mark, tried = tmp_path / "ran", 0
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.is_dir(), "the pickle of this test has no effect"
    mark.rmdir()
    archive = tmp_path / "archive.pt"
    torch.save(Evil(mark), archive)
    for evil in (pickle.dumps(Evil(mark)), archive.read_bytes()):
        shutil.copytree(finished, tmp_path / "run")
        folder = tmp_path / "run" / "checkpoints" / "step-00000002"
        manifest = json.loads((folder / "manifest.json").read_text())
        for file in manifest["files"]:
            (folder / file).write_bytes(evil)
            manifest["files"][file] = {"sha256": hashlib.sha256(evil).hexdigest(), "bytes": len(evil)}
        (folder / "manifest.json").write_bytes(signed(manifest))
        checkpoint = open_checkpoint(tmp_path / "run" / "checkpoints", 2)
        for file in (file for file in manifest["files"] if file.endswith(".safetensors")):
            with pytest.raises(CheckpointError, match="safetensors"):
                checkpoint.read(file)
            tried += 1
        shutil.rmtree(tmp_path / "run")
    assert not mark.exists()
    figure(f"{tried} files with code in them, 0 ran")


@pytest.mark.guarantee("G32")
def test_nothing_in_the_package_can_unpickle(figure: Figure) -> None:
    """No module of the package imports or calls anything that can run code from a file. distvsd/testing/ranks.py is
    exempt, because it only passes objects between the processes of a test."""
    package = Path(distvsd.__file__).parent
    modules = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
    calls = {"torch.load", "torch.jit.load", "yaml.load", "yaml.unsafe_load", "eval", "exec"}
    found: list[str] = []
    sources = [path for path in package.rglob("*.py") if path != package / "testing" / "ranks.py"]
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Import(names=names):
                    found += [f"{path}: {name.name}" for name in names if name.name.split(".")[0] in modules]
                case ast.ImportFrom(module=str(module)) if module.split(".")[0] in modules:
                    found.append(f"{path}: {module}")
                case ast.Call(func=function) if ast.unparse(function) in calls:
                    found.append(f"{path}: {ast.unparse(function)}")
                case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                    found.append(f"{path}: allow_pickle")
                case ast.keyword(arg="trust_remote_code", value=ast.Constant(value=True)):
                    found.append(f"{path}: trust_remote_code")
    assert len(sources) > 50 and not found, found
    figure(f"0 uses in {len(sources)} modules")


@contextmanager
def another_job(lock: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a run's lock. It is killed at the end of the block."""
    job = subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert job.stdout is not None and job.stdout.readline() == "held\n"
        yield job
    finally:
        job.kill()
        job.wait()


@pytest.mark.guarantee("G34")
def test_a_second_job_is_refused_and_the_lock_of_a_dead_one_is_taken(
    tmp_path: Path, prior: Path, finished: Path
) -> None:
    """A second job on a run directory is refused on every rank and changes no file. The message names the holder of the
    lock. After the holder is killed, the same command trains."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = training(run, prior)
    with another_job(run / "run.lock") as job:
        before = {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*")) if path.is_file()}
        said = refusals(config, 2)
        assert said[0] == said[1] and said[0].startswith("RunError: ")
        assert f"{socket.gethostname()}:{job.pid}:" in said[0] and "another run.dir" in said[0]
        after = {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*")) if path.is_file()}
        # A refused job does not own the directory, so it must not write its error there.
        assert after == before
        job.send_signal(signal.SIGKILL)
        job.wait()
        assert (run / "run.lock").exists()
        assert refusals(config, 2) == ["", ""]
    assert not (run / "run.lock").exists()


@pytest.mark.guarantee("G35")
def test_a_resume_against_another_prior_in_the_same_place_is_refused_by_every_rank(tmp_path: Path) -> None:
    """A resume with other weights of the frozen prior is refused, even if they are at the same path."""
    run, place = tmp_path / "run", tmp_path / "prior"
    tiny_pipeline(place, "shapes", "v_prediction", 0)
    config = training(run, place)
    assert refusals(config, 2) == ["", ""]
    shutil.rmtree(place)
    tiny_pipeline(place, "shapes", "v_prediction", 1)
    said = refusals(training(run, place), 2)
    assert said[0] == said[1] and said[0].startswith("CheckpointError: ")
    assert "another prior" in said[0] and str(place) in said[0]
