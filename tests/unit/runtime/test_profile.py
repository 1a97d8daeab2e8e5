"""A profile of rounds: which rounds, what belongs to which phase, what is written, and what goes wrong."""

from __future__ import annotations

import gzip
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distvsd.runtime.profile import Profile, by_phase, profiled_rounds, table


@pytest.mark.parametrize(
    ("first", "last", "count", "expected"),
    [
        (0, 100, 2, range(3, 5)),  # after three rounds of warm-up
        (40, 100, 2, range(43, 45)),  # also in a process that continues
        (0, 4, 2, range(2, 4)),  # sooner where few rounds are left
        (0, 1, 2, range(1)),  # as many as there are
        (5, 5, 2, range(5, 5)),
        (0, 100, 0, range(0)),
    ],
)
def test_rounds_are_recorded_after_the_warm_up_of_a_process(first: int, last: int, count: int, expected: range) -> None:
    assert profiled_rounds(first, last, count) == expected


@dataclass(frozen=True)
class Event:
    """The methods of torch's raw event that are used; times in nanoseconds."""

    label: str
    start: int
    end: int
    device: str = "CPU"
    thread: int = 1
    own_id: int = 0
    started_by: int = 0
    is_mark: bool = False

    def name(self) -> str:
        return self.label

    def start_ns(self) -> int:
        return self.start

    def end_ns(self) -> int:
        return self.end

    def duration_ns(self) -> int:
        return self.end - self.start

    def device_type(self) -> SimpleNamespace:
        return SimpleNamespace(name=self.device)

    def start_thread_id(self) -> int:
        return self.thread

    def correlation_id(self) -> int:
        return self.own_id

    def linked_correlation_id(self) -> int:
        return self.started_by

    def is_user_annotation(self) -> bool:
        return self.is_mark

    def is_async(self) -> bool:
        return False


EVENTS = [
    Event("phase: render", 100, 200, is_mark=True),
    Event("phase: update", 200, 500, is_mark=True),
    Event("phase: render", 500, 550, is_mark=True),  # a second group
    Event("outer", 110, 190, own_id=1),
    Event("inner", 120, 150, own_id=2),
    Event("inner", 150, 160, own_id=3),
    Event("before", 10, 90, own_id=4),
    Event("after", 560, 570, own_id=5),
    Event("outer", 505, 545, own_id=6),
    Event("backward", 210, 410, thread=2, own_id=7),  # on autograd's own thread
    Event("kernel", 300, 390, device="CUDA", thread=7, started_by=2),  # runs during the update
    Event("phase: render", 300, 390, device="CUDA", thread=7, started_by=99, is_mark=True),  # what torch adds on a GPU
]


def test_an_operator_counts_its_own_time_in_the_phase_that_it_began_in() -> None:
    phases = by_phase(EVENTS)
    assert list(phases) == ["render", "update"]
    render, update = phases["render"], phases["update"]
    assert (render.entries, update.entries) == (2, 1)
    assert (render.seconds, update.seconds) == pytest.approx((150e-9, 300e-9))
    outer, inner = render.operators["outer"], render.operators["inner"]
    assert (outer.calls, inner.calls) == (2, 2)
    assert (outer.host_s, inner.host_s) == pytest.approx(((80 - 30 - 10 + 40) * 1e-9, 40e-9))
    assert set(update.operators) == {"backward"} and update.operators["backward"].host_s == pytest.approx(200e-9)


def test_a_kernel_counts_for_the_phase_that_started_it() -> None:
    phases = by_phase(EVENTS)
    assert phases["render"].operators["inner"].device_s == pytest.approx(90e-9)
    assert sum(operator.device_s for operator in phases["update"].operators.values()) == 0


def test_the_table_is_per_round_and_counts_rounds_from_one() -> None:
    text = table(by_phase(EVENTS), 3, [7, 8])
    assert text.startswith("# Profile of rank 3, rounds 8 to 9\n") and text.isascii()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert [row[:2] + row[3:4] for row in rows if row[0] in ("render", "update")][:2] == [
        ["render", "1", "33.3%"],
        ["update", "0.5", "66.7%"],
    ]


def recorded(folder: Path, rounds: range = range(1, 3)) -> Profile:
    """Three rounds of two phases; products in known numbers."""
    profile = Profile(folder, 0, rounds)
    a = torch.ones(8, 8)
    for step in range(3):
        for phase, products in (("first", 2), ("second", 1), ("first", 1)):
            profile.enter(step, phase)
            for _ in range(products):
                a @ a
        profile.end_round(step)
    return profile


def test_the_files_hold_the_phases_of_the_rounds_and_no_others(tmp_path: Path) -> None:
    recorded(tmp_path / "profile").close()
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["rank-0.json.gz", "rank-0.md"]
    with gzip.open(tmp_path / "profile/rank-0.json.gz") as stream:
        events = json.load(stream)["traceEvents"]
    marks = [event["name"] for event in events if event.get("ph") == "X" and event["name"].startswith("phase: ")]
    assert sorted(marks) == sorted(2 * ["phase: first", "phase: second", "phase: first"])
    text = (tmp_path / "profile/rank-0.md").read_text()
    products = [line.split("|")[1:4] for line in text.splitlines() if "aten::mm " in line]
    assert [[cell.strip() for cell in row] for row in products] == [
        ["first", "aten::mm", "3"],
        ["second", "aten::mm", "1"],
    ]


def test_a_run_that_stops_early_leaves_the_rounds_that_there_were(tmp_path: Path) -> None:
    profile = recorded(tmp_path / "profile", range(2, 9))
    assert not (tmp_path / "profile").exists()
    profile.close()
    assert "# Profile of rank 0, round 3\n" in (tmp_path / "profile/rank-0.md").read_text()


def test_nothing_is_written_where_no_round_is_recorded(tmp_path: Path) -> None:
    recorded(tmp_path / "profile", range(0)).close()
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "profile").symlink_to(tmp_path / "outside")
    with caplog.at_level(logging.WARNING):
        recorded(tmp_path / "profile").close()
    assert "no profile of rank 0" in caplog.text and "links below a run directory are not followed" in caplog.text
    assert list((tmp_path / "outside").iterdir()) == []
