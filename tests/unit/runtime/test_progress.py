"""One live line on a terminal, plain lines elsewhere, nothing twice."""

from __future__ import annotations

import errno
import io

import pytest

from distvsd.runtime.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def run(progress: Progress, clock: Clock, rounds: int, seconds: float = 2.0) -> None:
    for round in range(1, rounds + 1):
        clock.now += seconds
        progress.update(round, updates_per_s=12.345, score_loss=0.25, healthy=7)
    progress.close()


def test_without_a_terminal_there_is_a_plain_line_every_few_rounds_and_the_last() -> None:
    stream, clock = io.StringIO(), Clock()
    run(Progress(25, particles=8, every=10, stream=stream, clock=clock), clock, 25)
    assert stream.getvalue().splitlines() == [
        "round 10/25  12.3 updates/s  ETA 0:30  score loss 0.25  healthy 7/8",
        "round 20/25  12.3 updates/s  ETA 0:10  score loss 0.25  healthy 7/8",
        "round 25/25  12.3 updates/s  ETA 0:00  score loss 0.25  healthy 7/8",
    ]


def test_on_a_terminal_one_line_is_drawn_over_and_ended_once() -> None:
    stream, clock = Terminal(), Clock()
    run(Progress(5, particles=8, stream=stream, clock=clock), clock, 5)
    assert stream.getvalue().count("\n") == 1 and stream.getvalue().endswith("\n")
    drawn = stream.getvalue().split("\r")[1:]
    assert len(drawn) == 5 and all("\x1b[K" in line for line in drawn)


def test_a_terminal_is_not_flooded() -> None:
    stream, clock = Terminal(), Clock()
    run(Progress(1000, particles=8, stream=stream, clock=clock), clock, 1000, seconds=0.001)
    assert stream.getvalue().count("\r") <= 12 and "round 1000/1000" in stream.getvalue()


def test_a_live_line_never_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    stream, clock = Terminal(), Clock()
    run(Progress(3, particles=8, stream=stream, clock=clock), clock, 3)
    assert all(len(line.split("\x1b")[0]) < 20 for line in stream.getvalue().split("\r"))


def test_a_note_stands_above_the_live_line() -> None:
    stream, clock = Terminal(), Clock()
    progress = Progress(5, particles=8, stream=stream, clock=clock)
    progress.update(1, 1.0, 0.1, 8)
    progress.note("saved step-00000001")
    progress.close()
    lines = stream.getvalue().replace("\x1b[K", "").split("\n")
    assert lines[0].split("\r")[-1] == "saved step-00000001" and "round 1/5" in lines[1]


def test_a_note_without_a_terminal_is_a_plain_line() -> None:
    stream = io.StringIO()
    Progress(5, particles=8, stream=stream).note("saved")
    assert stream.getvalue() == "saved\n"


def test_other_ranks_show_nothing() -> None:
    stream, clock = Terminal(), Clock()
    progress = Progress(3, particles=8, every=1, is_shown=False, stream=stream, clock=clock)
    progress.note("x")
    run(progress, clock, 3)
    assert stream.getvalue() == ""


@pytest.mark.parametrize("failure", [BrokenPipeError, OSError(errno.ENOSPC, "full"), ValueError("closed file")])
def test_a_stream_that_failed_is_not_written_to_again_and_raises_nothing(failure: Exception) -> None:
    class Broken(io.StringIO):
        writes = 0

        def write(self, text: str) -> int:
            self.writes += 1
            raise failure

    stream, clock = Broken(), Clock()
    run(Progress(3, particles=8, every=1, stream=stream, clock=clock), clock, 3)
    assert stream.writes == 1


def test_a_resumed_run_estimates_from_the_rounds_it_did_itself() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(1000, particles=8, every=1, stream=stream, clock=clock)
    for round in (901, 902):
        clock.now += 3.0
        progress.update(round, 1.0, 0.1, 8)
    assert "ETA 4:54" in stream.getvalue().splitlines()[-1]  # 98 rounds of 3 s


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (6.2, "0:07"), (754, "12:34"), (3723, "1:02:03"), (-1, "0:00")]
)
def test_durations_read_as_people_write_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_where_particles_take_turns_the_line_says_how_often_each_moved() -> None:
    stream = io.StringIO()
    Progress(100, 8, every=1, stream=stream, clock=lambda: 0.0, turns=4).update(6, 1.0, 0.5, 8)
    assert stream.getvalue().rstrip().endswith("healthy 8/8  1.5 updates a particle")
