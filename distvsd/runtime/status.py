"""STATUS.json: the state of a run for schedulers, scripts and people. Rank 0 writes it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal, get_args

from distvsd.errors import RunError
from distvsd.runtime import inside

State = Literal["running", "done", "preempted", "failed"]


def write_status(path: Path, state: State, round: int, rounds: int, message: str = "") -> None:
    """Replaces STATUS.json in one step, so that a reader never sees half of it. Raises RunError.

    round: rounds completed, of `rounds`. message: one line for people, the error of a failed run. `time` is Unix time.
    """
    if state not in get_args(State):
        raise RunError(f"{state!r} is not a state of a run; use one of {', '.join(get_args(State))}")
    record = {"state": state, "round": round, "rounds": rounds, "time": time.time(), "message": message}
    inside.write(path.parent, path.name, json.dumps(record, indent=1) + "\n")


def read_status(path: Path) -> dict[str, Any] | None:
    """The last status, None if the run has none yet. Raises RunError for a file that is not a status."""
    data = inside.read(path.parent, path.name)
    if data is None:
        return None
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is not JSON ({error}); delete it, the run writes a new one") from error
    if not isinstance(record, dict) or record.get("state") not in get_args(State):
        raise RunError(f"{path} is not the status of a run; delete it, the run writes a new one")
    return record
