"""Fault injection: named points in the program at which a test can kill a process, fail its disk or spoil a tensor.

`DISTVSD_FAULTS` holds a plan: faults separated by semicolons, each `kind@point` followed by conditions after colons:

    DISTVSD_FAULTS="kill@save.manifest:rank=1:step=4; enospc@save.write:rank=0:nth=3; nan@render:particle=2:step=5"

kinds: kill, stop, term, usr1 (signals to this process), enospc, edquot, eio, oom (errors raised), nan (rows of a
tensor), sleep (`ms=`). conditions: rank, step (the current round, from 0), particle, restart (the launcher's count of
restarts), nth (only the n-th time that the other conditions hold, from 1). Without a plan a point costs one comparison.
docs/checkpoint-format.md derives crash consistency from the points of a save.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from distvsd.errors import UsageError

VARIABLE: Final = "DISTVSD_FAULTS"

POINTS: Final = {
    "load": "before a rank loads its prior and makes its particles",
    "round": "a round begins",
    "render": "before a group of particles is rendered; nan: in the images of a particle",
    "latent": "nan: in the latents of a particle's views",
    "score": "nan: in what the networks answer for a particle's views",
    "gradient": "before a rank's particles are updated; nan: in the gradient of a particle's parameters",
    "exchange": "before the renders of all ranks are gathered",
    "reduce": "before the score network's gradients are summed over ranks; nan: in this rank's gradient",
    "save.stage": "before the folder of a new checkpoint is made, on rank 0",
    "save.write": "before a file of a checkpoint is written, on the rank that owns it",
    "save.flush": "after a file's bytes were handed to the system, before they are forced to the disk",
    "save.manifest": "all files are on the disk, the manifest is not, on rank 0",
    "save.rename": "the manifest is on the disk, the folder has no checkpoint's name yet, on rank 0",
    "save.swap": "a checkpoint of the same step was moved aside, the new one has not taken its place, on rank 0",
    "save.published": "the folder has its name, the parent folder is not forced to the disk, on rank 0",
    "save.prune": "before an old checkpoint is moved out of the way, on rank 0",
    "save.discard": "an unused folder is about to be deleted",
    "load.read": "before a file of a checkpoint is read",
    "page.write": "before the page of a particle is written to its file, in a thread beside the rounds",
    "page.read": "before the page of a particle is read from its file, in a thread beside the rounds",
    "telemetry": "before a line of metrics.jsonl or health.jsonl is written, on rank 0",
}
_SIGNALS: Final = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "usr1": signal.SIGUSR1}
_ERRORS: Final = {"enospc": errno.ENOSPC, "edquot": errno.EDQUOT, "eio": errno.EIO}
KINDS: Final = (*_SIGNALS, *_ERRORS, "oom", "nan", "sleep")
_CONDITIONS: Final = ("rank", "step", "particle", "restart", "nth", "ms")


@dataclass
class Fault:
    """One entry of a plan, with the number of times it has met its conditions."""

    kind: str
    point: str
    conditions: dict[str, int]
    met: int = field(default=0, compare=False)

    def is_due(self, point: str, step: int, ids: Sequence[int]) -> bool:
        """Whether this fault happens now. Counts the calls that meet its conditions: call it once for each pass."""
        here = {
            "rank": int(os.environ.get("RANK", "0")),
            "step": step,
            "restart": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        }
        if point != self.point or any(here[name] != n for name, n in self.conditions.items() if name in here):
            return False
        if "particle" in self.conditions and self.conditions["particle"] not in ids:
            return False
        self.met += 1
        return self.conditions.get("nth", self.met) == self.met


def parse(text: str) -> list[Fault]:
    """The faults of a plan. Raises UsageError for an unknown kind, point or condition."""
    faults = []
    for entry in filter(None, map(str.strip, text.split(";"))):
        head, *conditions = entry.split(":")
        kind, _, point = head.partition("@")
        if kind not in KINDS or point not in POINTS:
            raise UsageError(
                f"{VARIABLE}: {head!r} is not a fault; kinds are {', '.join(KINDS)}, points are {', '.join(POINTS)}"
            )
        numbers = {}
        for condition in conditions:
            name, _, number = condition.partition("=")
            if name not in _CONDITIONS or not number.isdecimal():
                raise UsageError(f"{VARIABLE}: {condition!r} is not a condition; use {', '.join(_CONDITIONS)} = n")
            numbers[name] = int(number)
        faults.append(Fault(kind, point, numbers))
    return faults


_plan: list[Fault] = parse(os.environ.get(VARIABLE, ""))
_step = 0


def fault(point: str, ids: Sequence[int] = ()) -> None:
    """Marks a named point in the program and does what the plan says for it. ids: the particles concerned, if any."""
    if not _plan:
        return
    for entry in _plan:
        if entry.kind != "nan" and entry.is_due(point, _step, ids):
            _strike(entry)


def poison(point: str, rows: Tensor, ids: Tensor | None = None) -> Tensor:
    """`rows` `[N, ...]`, or a copy in which the plan's rows are NaN: those whose id in `ids` `[N]` is the fault's
    particle, or all of them if the fault names no particle. Differentiable; the gradient of those rows is NaN."""
    if not _plan:
        return rows
    numbers = [] if ids is None else ids.tolist()
    for entry in _plan:
        if entry.kind == "nan" and entry.is_due(point, _step, numbers):
            struck = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
            if "particle" in entry.conditions and ids is not None:
                struck = ids.to(rows.device) == entry.conditions["particle"]
            rows = rows * torch.where(struck, torch.nan, 1.0).to(rows.dtype).reshape(-1, *[1] * (rows.ndim - 1))
    return rows


def begin_round(step: int) -> None:
    """Tells the plan which round begins, and marks the point `round`."""
    global _step
    if _plan:
        _step = step
        fault("round")


@contextlib.contextmanager
def injected(text: str) -> Iterator[list[Fault]]:
    """Makes `text` the plan inside the block, for this process and the processes that it forks; for tests."""
    global _plan, _step
    before = _plan, _step
    _plan, _step = parse(text), 0
    try:
        yield _plan
    finally:
        _plan, _step = before


def _strike(entry: Fault) -> None:
    if entry.kind in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[entry.kind])
    elif entry.kind in _ERRORS:
        number = _ERRORS[entry.kind]
        raise OSError(number, os.strerror(number), f"injected at {entry.point}")
    elif entry.kind == "oom":
        raise torch.OutOfMemoryError(f"injected at {entry.point}")
    elif entry.kind == "sleep":
        time.sleep(entry.conditions.get("ms", 0) / 1000)
