"""Work that ranks do together: a failure on any rank is the same error on all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distvsd.checkpoint.format import particle_of
from distvsd.errors import CheckpointError
from distvsd.parallel.collectives import attempt
from distvsd.parallel.world import World


class StorageError(CheckpointError):
    """The disk failed (full, over quota, an I/O error), not the program: the same save may succeed later."""


def together(world: World, action: str, work: Callable[[], Any]) -> list[Any]:
    """Runs `work` on every rank and returns the results (JSON) by rank. Collective; communicates once.

    If it fails on any rank, all ranks raise the same CheckpointError, which names those ranks and their reasons; a
    StorageError if only disks failed. If a rank raised alone, the others would wait for ever.
    """
    values, problems, _ = attempt(world, lambda: _described(work))
    failed = [problem.kind for problem in problems if problem is not None]
    by_disks = all(kind == StorageError.__name__ for kind in failed)
    refuse(action, [problem and problem.text for problem in problems], StorageError if by_disks else CheckpointError)
    return values


def refuse(action: str, problems: Sequence[str | None], error: type[CheckpointError] = CheckpointError) -> None:
    """Raises one error that lists the problems of all ranks, if there are any. Does not communicate."""
    ranks: dict[str, list[str]] = {}
    for rank, problem in enumerate(problems):
        if problem is not None:
            ranks.setdefault(problem, []).append(str(rank))
    if ranks:
        told = "; ".join(f"rank {', '.join(where)}: {problem}" for problem, where in ranks.items())
        raise error(f"{action} failed: {told}")


def owners_of(action: str, opened: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The rank that writes each file: the lowest that holds it. The same on every rank. Raises CheckpointError if ranks
    are at different steps or hold the same particle."""
    holders: dict[str, list[int]] = {}
    for rank, report in enumerate(opened):
        for file in report["files"]:
            holders.setdefault(file, []).append(rank)
    problems: list[str | None] = [None] * len(opened)
    for rank, report in enumerate(opened):
        if report["step"] != opened[0]["step"]:
            problems[rank] = f"is at step {report['step']} and rank 0 at {opened[0]['step']}"
        if shared := [file for file in report["files"] if particle_of(file) is not None and holders[file][0] != rank]:
            problems[rank] = (
                f"holds {shared[0]}, which rank {holders[shared[0]][0]} holds too; a particle has one owner"
            )
    refuse(action, problems)
    return {file: ranks[0] for file, ranks in holders.items()}


def refuse_drift(action: str, contents: Sequence[Mapping[str, str]]) -> None:
    """Raises CheckpointError if ranks hold different content of the same file."""
    first: dict[str, tuple[int, str]] = {}
    problems: list[str | None] = [None] * len(contents)
    for rank, content in enumerate(contents):
        for file, digest in content.items():
            holder, expected = first.setdefault(file, (rank, digest))
            if digest != expected:
                problems[rank] = f"holds another {file} than rank {holder}: the replicas have drifted apart"
    refuse(action, problems)


def _described(work: Callable[[], Any]) -> Any:
    """What the work returns; its errors become StorageError (of the disk) or CheckpointError."""
    try:
        return work()
    except CheckpointError:
        raise
    except OSError as error:
        hint = "check the free space, the quota and the permissions of the run directory"
        raise StorageError(f"{error}; {hint}") from error
    except Exception as error:
        raise CheckpointError(f"{type(error).__name__}: {error}") from error
