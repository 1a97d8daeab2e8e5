"""Reads and writes files below a run directory without following links.

A link in a run directory must not make a run overwrite, delete or send a file outside. The directory itself may be
reached through links. Below it every folder on the way must be a real one, and only regular files are read or written.
A link, a named pipe, or a folder in the place of a file is refused with its path; nothing waits for a pipe.

`name` is a path below `root`, with slashes. Every failure is a RunError.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Final

from distvsd.errors import RunError

_Kind = Callable[[int], bool]
_KINDS: Final[tuple[tuple[_Kind, str], ...]] = (
    (stat.S_ISREG, "a regular file"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
)
_STAGED: Final = re.compile(r"\..+-[0-9a-f]{32}")
_TO_READ: Final = "correct its permissions, or restore it"
_TO_WRITE: Final = "free space, or correct the permissions of its folder"


def read(root: Path, name: str) -> bytes | None:
    """The content of a file; None if there is no file."""
    path = root / name
    with _told(path, "read", _TO_READ):
        try:
            with _parent(root, name) as (parent, last):
                handle = _open(parent, last, path, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            return None
        with os.fdopen(handle, "rb") as stream:
            return stream.read()


def read_into(root: Path, name: str, data: memoryview) -> int:
    """Reads a file into memory; returns how many bytes came, at most the length of `data`. Raises RunError also where
    there is no file."""
    with _told(root / name, "read", _TO_READ), _parent(root, name) as (parent, last):
        handle = _open(parent, last, root / name, os.O_RDONLY)
        with os.fdopen(handle, "rb") as stream:
            return stream.readinto(data)


def open_file(root: Path, name: str, flags: int = 0) -> int:
    """A descriptor of a file for reading and writing; makes the file if missing. flags: further `os.O_*` flags."""
    with _told(root / name, "opened for writing", _TO_WRITE), _parent(root, name) as (parent, last):
        return _open(parent, last, root / name, os.O_RDWR | os.O_CREAT | flags)


@contextmanager
def replacing(root: Path, name: str) -> Iterator[IO[bytes]]:
    """A new file that replaces the old one atomically when the block ends without an error.

    A reader, also after a power cut, finds either the old content or the new. Missing folders below `root` are made. An
    OSError of the block becomes a RunError.
    """
    path = root / name
    with _told(path, "written", _TO_WRITE), _parent(root, name, make=True) as (parent, last):
        _refuse_others(path, _mode(parent, last), stat.S_ISREG)
        staged = f".{last}-{uuid.uuid4().hex}"
        try:
            with os.fdopen(_open(parent, staged, path, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(staged, last, src_dir_fd=parent, dst_dir_fd=parent)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(staged, dir_fd=parent)
            raise


def write(root: Path, name: str, text: str) -> None:
    """Replaces a file atomically, see `replacing`."""
    with replacing(root, name) as stream:
        stream.write(text.encode("utf-8"))


def delete(root: Path, name: str) -> None:
    """Deletes a file, or a link in its place, if there is one."""
    with (
        _told(root / name, "deleted", _TO_WRITE),
        contextlib.suppress(FileNotFoundError),
        _parent(root, name) as (parent, last),
    ):
        os.unlink(last, dir_fd=parent)


def discard_staged(root: Path, name: str) -> None:
    """Deletes from a folder what a process that was killed inside `replacing` left there. No other process may be
    writing into the folder."""
    for entry in names(root, name):
        if _STAGED.fullmatch(entry):
            delete(root, f"{name}/{entry}")


def make_folder(root: Path, name: str) -> None:
    """Makes a folder and its parents below `root`, if they are missing."""
    with _told(root / name, "made", _TO_WRITE), _folder(root, name, make=True):
        pass


def remove_folder(root: Path, name: str) -> None:
    """Deletes a folder of files, if there is one; a link in it is deleted and not followed."""
    for entry in names(root, name):
        delete(root, f"{name}/{entry}")
    with (
        _told(root / name, "deleted", _TO_WRITE),
        contextlib.suppress(FileNotFoundError),
        _parent(root, name) as (parent, last),
    ):
        os.rmdir(last, dir_fd=parent)


def names(root: Path, name: str) -> list[str]:
    """The names in a folder, sorted; none if there is no folder."""
    with (
        _told(root / name, "listed", _TO_READ),
        contextlib.suppress(FileNotFoundError),
        _folder(root, name) as handle,
        os.scandir(handle) as entries,
    ):
        return sorted(entry.name for entry in entries)
    return []


def files(root: Path, name: str, suffixes: tuple[str, ...]) -> list[str]:
    """The files with these endings in a folder and all below it, by their names below `root`, sorted. Raises RunError
    for anything but files and folders."""
    found: list[str] = []
    waiting = [name]
    while waiting:
        folder = waiting.pop()
        for below in (f"{folder}/{entry}" for entry in names(root, folder)):
            with _told(root / below, "looked at", _TO_READ), _parent(root, below) as (parent, last):
                is_folder = stat.S_ISDIR(_mode(parent, last) or 0)
            if is_folder and not below.endswith(suffixes):
                waiting.append(below)
                continue
            expect_file(root, below)
            found += [below] if below.endswith(suffixes) else []
    return sorted(found)


def expect_file(root: Path, name: str) -> None:
    """Raises RunError if this name is taken by anything but a regular file."""
    _expect(root, name, stat.S_ISREG)


def expect_folder(root: Path, name: str) -> None:
    """Raises RunError if this name is taken by anything but a folder."""
    _expect(root, name, stat.S_ISDIR)


@contextmanager
def _told(path: Path, done: str, advice: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"{path} cannot be {done} ({error.strerror or error}); {advice}") from error


@contextmanager
def _folder(root: Path, name: str, make: bool = False) -> Iterator[int]:
    """A descriptor of a folder. Raises OSError, and RunError if something on the way is not a folder."""
    handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    path = root
    try:
        for part in PurePosixPath(name).parts:
            path = path / part
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, dir_fd=handle)
            below = _open(handle, part, path, os.O_RDONLY | os.O_DIRECTORY)
            os.close(handle)
            handle = below
        yield handle
    finally:
        os.close(handle)


@contextmanager
def _parent(root: Path, name: str, make: bool = False) -> Iterator[tuple[int, str]]:
    """A descriptor of the folder that a name is in, and the last part of the name."""
    path = PurePosixPath(name)
    with _folder(root, str(path.parent), make) as handle:
        yield handle, path.name


def _open(parent: int, name: str, path: Path, flags: int) -> int:
    """Opens a regular file, or with O_DIRECTORY a folder. Raises OSError, and RunError if it is something else."""
    is_wanted = stat.S_ISDIR if flags & os.O_DIRECTORY else stat.S_ISREG
    try:
        # Non-blocking: opening a named pipe would wait for ever. It has no effect on files.
        handle = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666, dir_fd=parent)
    except OSError:
        _refuse_others(path, _mode(parent, name), is_wanted)
        raise
    try:
        _refuse_others(path, os.fstat(handle).st_mode, is_wanted)
    except RunError:
        os.close(handle)
        raise
    return handle


def _expect(root: Path, name: str, is_wanted: _Kind) -> None:
    with (
        _told(root / name, "looked at", _TO_READ),
        contextlib.suppress(FileNotFoundError),
        _parent(root, name) as (parent, last),
    ):
        _refuse_others(root / name, _mode(parent, last), is_wanted)


def _mode(parent: int, name: str) -> int | None:
    """The mode of what has this name, without following a link; None if there is nothing."""
    try:
        return os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return None


def _refuse_others(path: Path, mode: int | None, is_wanted: _Kind) -> None:
    """Raises RunError if something is there and is not of the wanted kind."""
    if mode is None or is_wanted(mode):
        return
    found = next((text for is_kind, text in _KINDS if is_kind(mode)), "a special file")
    wanted = dict(_KINDS)[is_wanted]
    raise RunError(
        f"{path} is {found} and not {wanted}, and links below a run directory are not followed; move it away, or put "
        f"{wanted} there"
    )
