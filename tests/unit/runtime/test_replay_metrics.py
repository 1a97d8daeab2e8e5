"""A finished run, sent to the real wandb, which keeps it offline; what it keeps is read back from its own files.

What is sent where wandb misbehaves is in tests/faults/test_telemetry.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from distvsd.export.images import contact_sheet, save_png, turntable
from distvsd.runtime.replay_metrics import particle_rows, replay
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
def run(tmp_path: Path) -> Path:
    """A run of 3 rounds and 2 particles, rendered and evaluated, as it lies on the disk."""
    run = tmp_path / "run"
    run.mkdir()
    views = torch.rand(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    save_png(contact_sheet(views), run, "renders/contact-sheet.png")
    save_png(contact_sheet(views), run, "renders/round-00000002/particles-000000-000001/contact-sheet.png")
    turntable(views[1], run, "renders/particle-000001.mp4")
    lines = [{"round": number, "score_loss": 1 / number, "lag": None} for number in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "health.jsonl").write_text("".join(json.dumps(event) + "\n" for event in EVENTS))
    evaluation = {"particles": 2, "label_accuracy": {"color": 0.5, "shape": 1.0}, "particles_detail": DETAILS}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    return run


def test_a_row_has_the_health_and_the_labels_of_a_particle() -> None:
    sound, ill = particle_rows(DETAILS, EVENTS)
    assert (sound["particle"], sound["events"], sound["last_event"]) == (0, 0, None)
    assert (ill["particle"], ill["events"], ill["last_event"], ill["last_event_round"]) == (1, 2, "quarantined", 3)
    assert (ill["label/color"], ill["expected/color"], ill["opacity"]) == ("blue", "red", 0.25)
    # A run that was not evaluated has a table of those to which something happened.
    (only,) = particle_rows([], EVENTS)
    assert only == {"particle": 1, "events": 2, "last_event": "quarantined", "last_event_round": 3}


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
