"""Sends a finished run from the disk to Weights and Biases: its metrics, pictures and evaluation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distvsd.errors import RunError
from distvsd.runtime import inside
from distvsd.runtime.paths import RunPaths
from distvsd.runtime.tracker import Limits, Mode, Tracker, open_tracker

# Shares by head (colour, shape, ...). A sweep optimises one number, so their mean is sent under the name itself.
SHARES = ("label_accuracy", "view_accuracy")
DEEPEST = 16  # levels of lists and objects in what is read; what a run writes has four


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
    """Sends the content of a run directory and returns the number of notes that wandb took. One process; may take long.

    First, round by round: metrics.jsonl and the pictures of that round. Then, one step later: the last pictures, a
    table of the particles with their health and labels, and the numbers of evaluation.json as `evaluation/...` in the
    summary. results_only: only the second part, for a run that was tracked during training. It is the same run in
    wandb: its id is in RUN/wandb.json, and wandb skips lines that it has. Raises RunError if the folder is not a run,
    if files are damaged (before anything is sent), or if wandb took nothing.
    """
    paths = RunPaths(run_dir)
    lines = list(_lines(paths.metrics, "round"))
    if not lines:
        raise RunError(f"{paths.metrics} has no line; give the directory of a run that has trained")
    events = list(_lines(paths.health, "round", "particle"))
    evaluation = _evaluation(paths.evaluation)
    pictures = _pictures(paths)
    room = Limits(queue=len(lines) + len(pictures) + 8)  # for all notes, so that none is dropped
    tracker = open_tracker(mode, run_dir, project, name, group, config, note, room)
    sent = 0 if results_only else _send_rounds(tracker, lines, pictures)
    rows = particle_rows(evaluation.get("particles_detail", []), events)
    sent += _send_results(tracker, rows, summary_of(evaluation), pictures.get(None, []), lines[-1]["round"] + 1)
    tracker.close(timeout_s)
    if tracker.run_id is None or tracker.dropped >= sent:
        raise RunError(f"wandb took nothing of {run_dir}; see the messages above, and {run_dir / 'wandb/console.log'}")
    return sent - tracker.dropped


def _send_rounds(tracker: Tracker, lines: list[dict[str, Any]], pictures: dict[int | None, list[Path]]) -> int:
    """Sends every round with a line or a picture in order, because wandb's steps must increase."""
    records = {line["round"]: line for line in lines}
    sent = 0
    for round in sorted(records.keys() | {round for round in pictures if round is not None}):
        if round in records:
            tracker.log(records[round], round)
            sent += 1
        if round in pictures:
            tracker.images(pictures[round], round)
            sent += 1
    return sent


def _send_results(
    tracker: Tracker, rows: list[dict[str, Any]], numbers: dict[str, float], pictures: list[Path], round: int
) -> int:
    sent = 0
    if pictures:
        tracker.images(pictures, round)
        sent += 1
    if rows:
        tracker.particles(rows, round)
        sent += 1
    if numbers:
        tracker.summary(numbers)
        sent += 1
    return sent


def particle_rows(details: list[dict[str, Any]], events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a particle: its health, its prompt, and each of its labels beside the one that the prompt asks for.

    details: as in evaluation.json. events: lines of health.jsonl; the last one of a particle is its present state.
    """
    rows: dict[int, dict[str, Any]] = {}
    for detail in details:
        row = _healthy(detail["id"]) | {key: detail.get(key) for key in ("prompt", "empty", "diverged", "opacity")}
        for kind, labels in (("label", detail["labels"]), ("expected", detail.get("expected", {}))):
            row |= {f"{kind}/{head}": word for head, word in labels.items()}
        rows[row["particle"]] = row
    for event in events:
        row = rows.setdefault(event["particle"], _healthy(event["particle"]))
        row["events"] += 1
        row["last_event"], row["last_event_round"] = event.get("event"), event["round"]
    return [rows[i] for i in sorted(rows)]


def _healthy(particle: int) -> dict[str, Any]:
    return {"particle": particle, "events": 0, "last_event": None, "last_event_round": None}


def summary_of(evaluation: dict[str, Any]) -> dict[str, float]:
    """The numbers of evaluation.json by path, without its entries per particle: `evaluation/diversity/vendi`."""
    numbers = dict(_numbers("evaluation", {k: v for k, v in evaluation.items() if k != "particles_detail"}))
    for name in SHARES:
        found = evaluation.get(name)
        shares = [value for _, value in _numbers("", found)] if isinstance(found, dict) else []
        if shares:
            numbers[f"evaluation/{name}"] = sum(shares) / len(shares)
    return numbers


def _numbers(path: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _numbers(f"{path}/{key}", entry)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def _pictures(paths: RunPaths) -> dict[int | None, list[Path]]:
    """Pictures and turntables by the round in their folder's name; None: those of the end. Raises RunError."""
    found: dict[int | None, list[Path]] = {}
    for name in inside.files(paths.root, paths.renders.name, (".png", ".mp4")):
        match = re.match(r"round-(\d{1,12})$", name.split("/")[1], re.ASCII)
        found.setdefault(int(match.group(1)) if match else None, []).append(paths.root / name)
    return found


def _lines(path: Path, *counts: str) -> Iterator[dict[str, Any]]:
    """The lines of a file, none if there is no file. An incomplete last line, as a killed run leaves it, is skipped.

    counts: keys that every line must have, with an integer. Raises RunError with the number of a damaged line.
    """
    *whole, _ = (inside.read(path.parent, path.name) or b"").split(b"\n")
    for number, line in enumerate(whole, 1):
        record = _json(line, f"line {number} of {path}")
        for key in counts:
            _expect_count(record, key, f"line {number} of {path}")
        yield record


def _evaluation(path: Path) -> dict[str, Any]:
    """evaluation.json, empty if there is none. Raises RunError if its `particles_detail` is not a list of particles."""
    data = inside.read(path.parent, path.name)
    if data is None:
        return {}
    evaluation = _json(data, str(path))
    details = evaluation.get("particles_detail", [])
    for detail in details if isinstance(details, list) else [details]:
        texts = isinstance(detail, dict) and [detail.get("labels"), detail.get("expected", {})]
        if not texts or not all(isinstance(entry, dict) for entry in texts):
            raise RunError(f"{path} has particles_detail that is not a list of particles; evaluate the run again")
        _expect_count(detail, "id", str(path))
    return evaluation


def _expect_count(record: dict[str, Any], key: str, where: str) -> None:
    value = record.get(key)
    if type(value) is not int or not 0 <= value < 2**63:
        raise RunError(f"{where} has no integer {key!r} ({value!r:.40}); correct it, or delete the damaged part")


def _json(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{where} is not JSON ({str(error)[:200]}); correct it, or delete the damaged part") from error
    if not isinstance(value, dict):
        raise RunError(f"{where} is {value!r:.80} and not a JSON object; correct it, or delete the damaged part")
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        lists = [entry.values() if isinstance(entry, dict) else entry for entry in level]
        level = [inner for entries in lists for inner in entries if isinstance(inner, dict | list)]
    if level:
        raise RunError(f"{where} is nested more than {DEEPEST} deep; correct it, or delete the damaged part")
    return value
