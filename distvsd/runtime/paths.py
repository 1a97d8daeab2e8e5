"""The run directory: its names, its configuration, its lock. Rank 0 only; nothing here communicates."""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from distvsd.errors import RunError
from distvsd.runtime import inside
from distvsd.runtime.process import is_from_here, may_live, process_name

Resume = Literal["auto", "must", "never"]

_ATTEMPTS = 20
# Ranks write their heartbeats every second; a network file system may show them some seconds later.
SILENCE_S = 15.0


@dataclass(frozen=True)
class RunPaths:
    """The fixed names inside a run directory; `root` is `run.dir` itself. Constructing it touches no disk."""

    root: Path

    @property
    def status(self) -> Path:
        return self.root / "STATUS.json"

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def health(self) -> Path:
        return self.root / "health.jsonl"

    @property
    def lock(self) -> Path:
        return self.root / "run.lock"

    @property
    def heartbeats(self) -> Path:
        return self.root / "heartbeats"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def pages(self) -> Path:
        return self.root / "pages"

    @property
    def renders(self) -> Path:
        return self.root / "renders"

    @property
    def exports(self) -> Path:
        return self.root / "exports"

    @property
    def profile(self) -> Path:
        return self.root / "profile"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation.json"

    @property
    def wandb(self) -> Path:
        return self.root / "wandb"

    def create(self) -> None:
        """Makes the directory if it is missing, and checks that it can be written to and that its names are of the
        right kind (file or folder). Raises RunError."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise RunError(f"run.dir {self.root} cannot be a directory: {error.filename} is a file") from error
        except (OSError, ValueError) as error:
            raise RunError(f"run.dir {self.root} cannot be written to ({error}); choose another run.dir") from error
        self.prove_writable()
        for file in (self.status, self.config, self.metrics, self.health, self.lock, self.evaluation):
            inside.expect_file(self.root, file.name)
        for folder in (self.heartbeats, self.checkpoints, self.pages, self.renders, self.profile, self.wandb):
            inside.expect_folder(self.root, folder.name)
        for name in inside.names(self.root, self.heartbeats.name):
            inside.expect_file(self.root, f"{self.heartbeats.name}/{name}")

    def prove_writable(self) -> None:
        """Raises RunError if no file can be made in the directory."""
        probe = self.root / f".probe-{uuid.uuid4().hex}"
        try:
            probe.touch(exist_ok=False)
            probe.unlink()
        except OSError as error:
            raise RunError(f"run.dir {self.root} cannot be written to ({error}); choose another run.dir") from error

    def previous_config(self) -> str | None:
        """The text of config.yaml, None in a fresh directory. Raises RunError."""
        data = inside.read(self.root, self.config.name)
        try:
            return None if data is None else data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RunError(f"{self.config} is not UTF-8 ({error}); restore it, or choose another run.dir") from error

    def known_config(self) -> Path:
        """The path of config.yaml. Raises RunError if there is none: then the directory is not a run."""
        if self.previous_config() is None:
            raise RunError(f"{self.root} is not a run: it has no config.yaml; give the run.dir of a training")
        return self.config

    def claim(self, config: str, resume: Resume, differences: Sequence[str] | None = None) -> None:
        """Checks that the directory belongs to this run, and writes config.yaml into a fresh one. `adopt` writes a
        changed one, after the run could be resumed with it. Call it with the lock held.

        resume: 'auto' continues a run with the same configuration; 'must' requires a run and accepts a changed
        configuration; 'never' requires that there is none. differences: what changed against `previous_config`, in
        words; without it the texts are compared line by line. Raises RunError.
        """
        before = self.previous_config()
        if before is None and resume == "must":
            raise RunError(f"{self.root} holds no run to resume; give the run.dir of one, or leave out --resume must")
        if before is not None and resume == "never":
            raise RunError(f"{self.root} holds a run already; choose another run.dir, or resume it with --resume auto")
        if before is not None and resume == "auto":
            changed = _changed_lines(before, config) if differences is None else list(differences)
            if changed:
                raise RunError(
                    f"{self.root} holds a run of another configuration ({'; '.join(changed[:8])}); choose another "
                    f"run.dir, or continue that run with the new values by --resume must"
                )
        if before is None:
            inside.write(self.root, self.config.name, config)

    def adopt(self, config: str) -> None:
        """Writes config.yaml if it differs. Raises RunError."""
        if self.previous_config() != config:
            inside.write(self.root, self.config.name, config)


class RunLock:
    """Keeps a second job out of a run directory, as a context manager or with `acquire` and `release`.

    The lock file holds the `process_name` of its holder. The lock of a holder that can be seen from here is taken over
    if that process is dead, or if a younger process has its pid. A holder on another host, in another container or from
    before a reboot cannot be seen; its lock is taken over if no rank of its run has written a heartbeat for
    `SILENCE_S`. Without any heartbeat files it is left in place.
    """

    def __init__(self, path: Path, heartbeats: Path | None = None, silence_s: float = SILENCE_S) -> None:
        """heartbeats: the folder of the run's heartbeats."""
        self._path, self._heartbeats, self._silence_s = path, heartbeats, silence_s

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def acquire(self) -> None:
        """Takes the lock, or raises RunError with the name of its holder."""
        inside.expect_file(self._path.parent, self._path.name)
        try:
            for attempt in range(_ATTEMPTS):
                if self._try(empty_is_free=attempt == _ATTEMPTS - 1):
                    return
                time.sleep(0.05)
        except OSError as error:
            raise RunError(f"{self._path} cannot be taken ({error}); choose another run.dir") from error
        raise RunError(f"{self._path} keeps changing: several jobs were started on this run directory; start only one")

    def release(self) -> None:
        """Gives the lock back if this process still holds it."""
        with contextlib.suppress(OSError, RunError):
            if inside.read(self._path.parent, self._path.name) == process_name().encode():
                self._path.unlink()

    def _try(self, empty_is_free: bool) -> bool:
        """Takes the lock; returns False if its file is just being made or deleted. Raises RunError."""
        is_new = True
        try:
            handle = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        except FileExistsError:
            is_new = False
            try:
                handle = os.open(self._path, os.O_RDWR | os.O_NOFOLLOW)
            except FileNotFoundError:
                return False
        try:
            # Serialises jobs that find the same dead holder; without flock (some Lustre) they are not serialised.
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            holder = os.pread(handle, 4096, 0).decode("utf-8", "replace").strip("\0\n ")
            if holder and holder != process_name() and may_live(holder) and not self._is_silent(holder):
                raise RunError(
                    f"{self._path} is held by {holder!r:.200} (host:pid:start:system), so another job uses this run "
                    f"directory: end it or choose another run.dir; delete the file only if that job is surely gone"
                )
            if not (holder or is_new or empty_is_free) or not _is_at(handle, self._path):
                return False
            # The dead holder's name is overwritten. If the file were deleted, another job could come in between.
            os.ftruncate(handle, 0)
            os.pwrite(handle, process_name().encode(), 0)
            os.fsync(handle)
            return True
        finally:
            os.close(handle)

    def _is_silent(self, holder: str) -> bool:
        """Whether the run of a holder that cannot be seen from here has heartbeats and has stopped writing them. Waits
        up to `SILENCE_S`."""
        if is_from_here(holder) or self._heartbeats is None:
            return False
        before = _contents(self._heartbeats)
        if not before:
            return False
        deadline = time.monotonic() + self._silence_s
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._silence_s))
            if _contents(self._heartbeats) != before:
                return False
        return True


def _changed_lines(before: str, after: str) -> list[str]:
    lines = difflib.ndiff(before.splitlines(), after.splitlines())
    return [f"{'was' if line[0] == '-' else 'is'} {line[2:].strip()}" for line in lines if line[0] in "-+"]


def _contents(folder: Path) -> dict[str, bytes]:
    found = {}
    for name in inside.names(folder.parent, folder.name):
        with contextlib.suppress(RunError):
            found[name] = inside.read(folder.parent, f"{folder.name}/{name}") or b""
    return found


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is still the one at this path."""
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except FileNotFoundError:
        return False
