"""A finished run is sent to the real wandb in offline mode and read back from wandb's own files.

Sending to a wandb that misbehaves is tested in tests/faults/test_telemetry.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from distvsd.errors import RunError
from distvsd.looking.images import contact_sheet, save_png, turntable
from distvsd.runtime.replay_metrics import particle_rows, replay, summary_of
from distvsd.runtime.tracker import open_tracker
from tests.wandb_file import history_of, records_of

DETAILS = [
    {
        "id": number,
        "prompt": "a red cube",
        "labels": {"color": color, "shape": "cube"},
        "expected": {"color": "red", "shape": "cube"},
        "empty": False,
        "diverged": False,
        "opacity": 0.25,
    }
    for number, color in enumerate(("red", "blue"))
]
EVENTS = [
    {"round": 2, "particle": 1, "event": "gradient not finite"},
    {"round": 3, "particle": 1, "event": "quarantined"},
]


@pytest.fixture(autouse=True)
def no_settings_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """The files of an evaluated run of 3 rounds and 2 particles, without images."""
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"round": number, "score_loss": 1 / number, "lag": None} for number in (1, 2, 3)]
    torn = '{"round": 4, "score_lo'  # as a kill leaves it
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    (run / "health.jsonl").write_text("".join(json.dumps(event) + "\n" for event in EVENTS))
    evaluation = {"particles": 2, "label_accuracy": {"color": 0.5, "shape": 1.0}, "particles_detail": DETAILS}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    return run


@pytest.fixture
def run(plain: Path) -> Path:
    """`plain` with images."""
    views = torch.rand(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    save_png(contact_sheet(views), plain, "renders/contact-sheet.png")
    save_png(contact_sheet(views), plain, "renders/round-00000002/particles-000000-000001/contact-sheet.png")
    turntable(views[1], plain, "renders/particle-000001.mp4")
    return plain


def test_a_row_has_the_health_and_the_labels_of_a_particle() -> None:
    sound, ill = particle_rows(DETAILS, EVENTS)
    assert (sound["particle"], sound["events"], sound["last_event"]) == (0, 0, None)
    assert (ill["particle"], ill["events"], ill["last_event"], ill["last_event_round"]) == (1, 2, "quarantined", 3)
    assert (ill["label/color"], ill["expected/color"], ill["opacity"]) == ("blue", "red", 0.25)
    # Without an evaluation the table has only the particles with events.
    (only,) = particle_rows([], EVENTS)
    assert only == {"particle": 1, "events": 2, "last_event": "quarantined", "last_event_round": 3}


DAMAGED_LINES = {
    "not JSON": b'{"round": 2,,}',
    "not UTF-8": b'{"round": 2, "note": "\xff\xfe"}',
    "zeros, as a power cut leaves them": b"\0" * 100,
    "not an object": b"[2]",
    "UTF-16": "[2]".encode("utf-16"),
    "a round of another type": b'{"round": "2", "particle": 0}',
    "a round that is no number": b'{"round": NaN, "particle": 0}',
    "a round below zero": b'{"round": -2, "particle": 0}',
    "a round beyond all": b'{"round": 1%s, "particle": 0}' % (b"0" * 30),
    "more digits than a number may have": b'{"round": 1%s}' % (b"0" * 10_000),
    "nothing of ours": b"{}",
    "nested without end": b'{"round": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested deeply": b'{"round": 2, "particle": 0, "x": ' + b"[" * 300 + b"]" * 300 + b"}",
    "an empty line": b"",
}


@pytest.mark.parametrize("damage", DAMAGED_LINES)
@pytest.mark.parametrize("file", ["metrics.jsonl", "health.jsonl"])
def test_a_damaged_line_is_named_before_anything_is_sent(plain: Path, file: str, damage: str) -> None:
    first, rest = (plain / file).read_bytes().split(b"\n", 1)
    (plain / file).write_bytes(first + b"\n" + DAMAGED_LINES[damage] + b"\n" + rest)
    with pytest.raises(RunError, match=f"line 2 of .*{file}") as caught:
        replay(plain, "offline", "", "", "", {}, lambda text: None)
    assert len(str(caught.value)) < 1000
    assert not (plain / "wandb.json").exists()


DAMAGED_EVALUATIONS = {
    "not JSON": b"{",
    "not UTF-8": b'{"particles": "\xff"}',
    "not an object": b"[]",
    "particles that are none": b'{"particles_detail": 3}',
    "a particle that is none": b'{"particles_detail": [3]}',
    "a particle without an id": b'{"particles_detail": [{"labels": {}}]}',
    "labels of another type": b'{"particles_detail": [{"id": 0, "labels": ["red"]}]}',
    "expected labels of another type": b'{"particles_detail": [{"id": 0, "labels": {}, "expected": 3}]}',
    "nested deeply": b'{"diversity": ' + b'{"a": ' * 500 + b"1" + b"}" * 501,
}


@pytest.mark.parametrize("damage", DAMAGED_EVALUATIONS)
def test_a_damaged_evaluation_is_named_before_anything_is_sent(plain: Path, damage: str) -> None:
    (plain / "evaluation.json").write_bytes(DAMAGED_EVALUATIONS[damage])
    with pytest.raises(RunError, match=r"evaluation\.json"):
        replay(plain, "offline", "", "", "", {}, lambda text: None)
    assert not (plain / "wandb.json").exists()


def test_numbers_of_other_types_in_an_evaluation_are_left_out() -> None:
    assert summary_of({"label_accuracy": 3, "view_accuracy": {"a": "x", "b": 0.5}, "modes": None}) == {
        "evaluation/label_accuracy": 3,
        "evaluation/view_accuracy/b": 0.5,
        "evaluation/view_accuracy": 0.5,
    }


@pytest.mark.guarantee("G27")
def test_the_real_wandb_gets_rounds_sheets_turntables_and_the_table_as_one_run(run: Path) -> None:
    """A run that was tracked for a round and is sent afterwards is one run in wandb: every round once, contact sheets
    and turntables as media, a table with the health and the labels of every particle, the evaluation as its summary."""
    pytest.importorskip("wandb")
    notes: list[str] = []
    tracker = open_tracker("offline", run, "castles", "small", "", {}, notes.append)
    tracker.log({"round": 1}, 1)
    tracker.close(60)
    # 3 rounds, the sheet of the second, the last sheet with the turntable, the table, the summary.
    assert replay(run, "offline", "castles", "small", "", {"prompt": "a red cube"}, notes.append) == 7
    assert notes == []
    first, last = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert first.name == last.name == f"run-{tracker.run_id}.wandb"

    records = list(records_of(last))
    logged = [entry for record in records for entry in history_of(record)]
    assert [(row["_step"], row["score_loss"]) for row in logged if "score_loss" in row] == [
        (1, 1.0),
        (2, 0.5),
        (3, 1 / 3),
    ]
    media = {key.partition("/")[0]: row["_step"] for row in logged for key in row if key.endswith("_type")}
    assert media == {"particles-000000-000001": 2, "contact-sheet": 4, "particle-000001": 4, "particles": 4}
    summary: dict[str, Any] = {}
    for record in (record for record in records if record.WhichOneof("record_type") == "summary"):
        summary |= {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.summary.update}
    assert summary["evaluation/label_accuracy"] == 0.75 and summary["evaluation/label_accuracy/shape"] == 1.0

    files = last.parent / "files/media"
    (video,) = files.rglob("*.mp4")
    assert video.read_bytes() == (run / "renders/particle-000001.mp4").read_bytes()
    assert len(list(files.rglob("*.png"))) == 2
    (table,) = (json.loads(path.read_text()) for path in files.rglob("*.table.json"))
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert rows == particle_rows(DETAILS, EVENTS)
