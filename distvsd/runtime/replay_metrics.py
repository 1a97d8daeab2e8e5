"""A run on the disk, sent to Weights and Biases afterwards: its metrics, its pictures, its evaluation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distvsd.errors import RunError
from distvsd.runtime.paths import RunPaths
from distvsd.runtime.tracker import Limits, Mode, Tracker, open_tracker

# Shares by head (colour, shape, ...): a sweep needs one number, so their mean has the name itself.
SHARES = ("label_accuracy", "view_accuracy")


def replay(
    run_dir: Path,
    mode: Mode,
    project: str,
    name: str,
    group: str,
    config: dict[str, Any],
    note: Callable[[str], None],
    results_only: bool = False,
    timeout_s: float = 600.0,
) -> int:
    """Sends what is in a run directory and returns the number of notes wandb took. No rank but one; may wait long.

    Round by round: metrics.jsonl and the pictures of that round. Then, one step later: the last pictures, a table of
    the particles with their health and labels, and the numbers of evaluation.json as `evaluation/...` in the summary.
    results_only: the latter alone, for a run that was tracked while it trained. It is the same run in wandb: its id is
    in RUN/wandb.json, and lines it has already are skipped there. Raises RunError for a folder that is no run, or where
    wandb took nothing.
    """
    paths = RunPaths(run_dir)
    lines = list(_lines(paths.metrics))
    if not lines:
        raise RunError(f"{paths.metrics} has no line; give the directory of a run that has trained")
    pictures = _pictures(paths.renders)
    room = Limits(queue=len(lines) + len(pictures) + 8)  # for everything: nothing is dropped for being quick
    tracker = open_tracker(mode, run_dir, project, name, group, config, note, room)
    sent = 0 if results_only else _send_rounds(tracker, lines, pictures)
    sent += _send_results(tracker, paths, pictures.get(None, []), int(lines[-1]["round"]) + 1)
    tracker.close(timeout_s)
    if tracker.run_id is None or tracker.dropped >= sent:
        raise RunError(f"wandb took nothing of {run_dir}; see the messages above, and {run_dir / 'wandb/console.log'}")
    return sent - tracker.dropped


def _send_rounds(tracker: Tracker, lines: list[dict[str, Any]], pictures: dict[int | None, list[Path]]) -> int:
    """Every round with a line or a picture, in order, because wandb takes no step back."""
    records = {int(line["round"]): line for line in lines}
    sent = 0
    for round in sorted(records.keys() | {round for round in pictures if round is not None}):
        if round in records:
            tracker.log(records[round], round)
            sent += 1
        if round in pictures:
            tracker.images(pictures[round], round)
            sent += 1
    return sent


def _send_results(tracker: Tracker, paths: RunPaths, pictures: list[Path], round: int) -> int:
    evaluation: dict[str, Any] = {}
    if paths.evaluation.is_file():
        evaluation = _json(paths.evaluation.read_text(encoding="utf-8"), paths.evaluation)
    sent = 0
    if pictures:
        tracker.images(pictures, round)
        sent += 1
    if rows := particle_rows(evaluation.get("particles_detail", []), list(_lines(paths.health))):
        tracker.particles(rows, round)
        sent += 1
    if numbers := summary_of(evaluation):
        tracker.summary(numbers)
        sent += 1
    return sent


def particle_rows(details: list[dict[str, Any]], events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a particle: its health, its prompt, and each of its labels beside the one that the prompt asks for.

    details: as in evaluation.json. events: lines of health.jsonl; the last one of a particle says how it stands.
    """
    rows: dict[int, dict[str, Any]] = {}
    for detail in details:
        row = _healthy(int(detail["id"])) | {key: detail.get(key) for key in ("prompt", "empty", "diverged", "opacity")}
        for kind, labels in (("label", detail["labels"]), ("expected", detail.get("expected", {}))):
            row |= {f"{kind}/{head}": word for head, word in labels.items()}
        rows[row["particle"]] = row
    for event in events:
        row = rows.setdefault(int(event["particle"]), _healthy(int(event["particle"])))
        row["events"] += 1
        row["last_event"], row["last_event_round"] = event["event"], event["round"]
    return [rows[i] for i in sorted(rows)]


def _healthy(particle: int) -> dict[str, Any]:
    return {"particle": particle, "events": 0, "last_event": None, "last_event_round": None}


def summary_of(evaluation: dict[str, Any]) -> dict[str, float]:
    """The numbers of evaluation.json by path, without its entries per particle: `evaluation/diversity/vendi`."""
    numbers = dict(_numbers("evaluation", {k: v for k, v in evaluation.items() if k != "particles_detail"}))
    for name in SHARES:
        shares = [value for value in (evaluation.get(name) or {}).values() if isinstance(value, int | float)]
        if shares:
            numbers[f"evaluation/{name}"] = sum(shares) / len(shares)
    return numbers


def _numbers(path: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _numbers(f"{path}/{key}", entry)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def _pictures(renders: Path) -> dict[int | None, list[Path]]:
    """Pictures and turntables by the round in their folder's name; None: those of the end."""
    found: dict[int | None, list[Path]] = {}
    for path in sorted(path for kind in ("*.png", "*.mp4") for path in renders.rglob(kind)):
        match = re.match(r"round-(\d+)$", path.relative_to(renders).parts[0])
        found.setdefault(int(match.group(1)) if match else None, []).append(path)
    return found


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file, none if there is no file; half a line at the end is left out. Raises RunError."""
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                yield _json(line, path)


def _json(text: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise RunError(f"{path} holds what is not JSON ({error}); mend or delete that line") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} holds {text.strip()[:80]!r} where an object was expected; mend or delete that line")
    return value
