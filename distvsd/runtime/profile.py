"""A profile of some rounds: a trace that opens in Perfetto, and a table of phases with their heaviest operators.

It only listens: no kernel and no bit of the run changes. Whatever goes wrong with it is a warning.
"""

from __future__ import annotations

import contextlib
import gzip
import logging
import shutil
import tempfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from distvsd.runtime import inside

_log = logging.getLogger("distvsd")
# The first rounds of a process load kernels, fill caches and grow the allocator's memory.
WARM_UP: Final = 3
OPERATORS: Final = 5  # of a phase, in the table
_MARK: Final = "phase: "
_NS: Final = 1e-9


def profiled_rounds(first: int, last: int, count: int) -> range:
    """The rounds to record in a process that trains rounds `first` to `last - 1`: `count` of them after `WARM_UP`, or
    sooner where fewer are left; none where `count` is 0."""
    if count == 0:
        return range(0)
    start = max(first, min(first + WARM_UP, last - count))
    return range(start, min(start + count, last))


class Profile:
    """Records this rank's `rounds` and writes `rank-0.json.gz` and `rank-0.md` into `folder`, with the rank's number.

    Local. `enter` marks where a phase begins, `end_round` where a round is over; a phase may come several times. The
    files are written after the last of `rounds`, or by `close` with the rounds that there were. No method raises.
    """

    def __init__(self, folder: Path, rank: int, rounds: range) -> None:
        self._folder, self._rank, self._rounds = folder, rank, rounds
        self._recorder: profile | None = None
        self._phase: record_function | None = None
        self._recorded: list[int] = []

    def enter(self, step: int, phase: str) -> None:
        """The phase `phase` of round `step` begins, and the one before ends."""
        if step not in self._rounds:
            return
        with self._guarded():
            self._leave()
            if self._recorder is None:
                self._recorder = profile(activities=_activities())
                self._recorder.start()
            self._phase = record_function(_MARK + phase)
            self._phase.__enter__()

    def end_round(self, step: int) -> None:
        """All that belongs to round `step` is done. Takes seconds after the last of the recorded rounds."""
        if self._recorder is None:
            return
        with self._guarded():
            self._leave()
        self._recorded.append(step)
        if self._rounds and step == self._rounds[-1]:
            self.close()

    def close(self) -> None:
        """Writes what was recorded; does nothing where nothing is left to write."""
        if self._recorder is None:
            return
        with self._guarded():
            self._leave()
            recorder, self._recorder, self._rounds = self._recorder, None, range(0)
            recorder.stop()
            self._write(recorder)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Whatever goes wrong inside ends the profile and not the run."""
        try:
            yield
        except Exception as error:  # whatever it is: other ranks would wait for this one
            recorder, self._recorder, self._phase, self._rounds = self._recorder, None, None, range(0)
            with contextlib.suppress(Exception):
                if recorder is not None:
                    recorder.stop()
            _log.warning("no profile of rank %d in %s: %s", self._rank, self._folder, error)

    def _leave(self) -> None:
        phase, self._phase = self._phase, None
        if phase is not None:
            phase.__exit__(None, None, None)

    def _write(self, recorder: profile) -> None:
        root, name = self._folder.parent, f"{self._folder.name}/rank-{self._rank}"
        assert recorder.profiler is not None and recorder.profiler.kineto_results is not None, "it was stopped"
        phases = by_phase(recorder.profiler.kineto_results.events())
        inside.write(root, f"{name}.md", table(phases, self._rank, self._recorded))
        # The profiler takes the name of a file and follows links, so its file is made elsewhere.
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            recorder.export_chrome_trace(str(trace))
            with (
                inside.replacing(root, f"{name}.json.gz") as stream,
                gzip.GzipFile(fileobj=stream, mode="wb", compresslevel=5) as packed,
                trace.open("rb") as plain,
            ):
                shutil.copyfileobj(plain, packed)
        _log.info("profile of %d rounds: %s", len(self._recorded), self._folder / f"rank-{self._rank}.md")


def _activities() -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])


@dataclass
class Operator:
    """calls of an operator; host_s, device_s: its own seconds on the host and of the kernels that it started."""

    calls: int = 0
    host_s: float = 0.0
    device_s: float = 0.0


@dataclass
class Phase:
    """entries: how often the phase was entered. seconds: between its marks, on the host. operators: by name, those that
    began between the marks, on any thread."""

    entries: int = 0
    seconds: float = 0.0
    operators: dict[str, Operator] = field(default_factory=dict)


def by_phase(events: Sequence[Any]) -> dict[str, Phase]:
    """The phases in the order of their first entry, from a profiler's raw events (torch's `_KinetoEvent`). What began
    outside of all is left out.

    A kernel counts for the phase that started it, not for the one during which it runs.
    """
    # torch's own tree of the events takes 200 microseconds for each; a round has up to hundreds of thousands.
    host = [event for event in events if event.device_type().name == "CPU" and not event.is_async()]
    marks = sorted((event.start_ns(), event.end_ns(), event.name()) for event in host if _is_mark(event))
    starts = [start for start, _, _ in marks]
    phases: dict[str, Phase] = {}
    for start, end, name in marks:
        phase = phases.setdefault(name.removeprefix(_MARK), Phase())
        phase.entries += 1
        phase.seconds += (end - start) * _NS
    kernels: dict[int, int] = {}
    for event in events:
        if event.device_type().name != "CPU" and not event.is_user_annotation():
            started_by = event.linked_correlation_id()
            kernels[started_by] = kernels.get(started_by, 0) + event.duration_ns()
    operators = [event for event in host if not event.is_user_annotation()]
    for event, own_ns in _own_times(operators):
        at = bisect_right(starts, event.start_ns()) - 1
        if at < 0 or event.start_ns() > marks[at][1]:
            continue
        operator = phases[marks[at][2].removeprefix(_MARK)].operators.setdefault(event.name(), Operator())
        operator.calls += 1
        operator.host_s += own_ns * _NS
        operator.device_s += kernels.get(event.correlation_id(), 0) * _NS
    return phases


def _own_times(events: Sequence[Any]) -> list[tuple[Any, int]]:
    """Each event with its nanoseconds without those of the events that it encloses on its thread."""
    own: list[tuple[Any, int]] = []
    around: list[int] = []  # places in `own` of the events that enclose the next one
    thread = None
    for event in sorted(events, key=lambda event: (event.start_thread_id(), event.start_ns(), -event.end_ns())):
        if event.start_thread_id() != thread:
            thread, around = event.start_thread_id(), []
        while around and own[around[-1]][0].end_ns() <= event.start_ns():
            around.pop()
        if around:
            outer, left = own[around[-1]]
            own[around[-1]] = outer, left - event.duration_ns()
        around.append(len(own))
        own.append((event, event.duration_ns()))
    return own


def _is_mark(event: Any) -> bool:
    return str(event.name()).startswith(_MARK)


def table(phases: dict[str, Phase], rank: int, rounds: Sequence[int]) -> str:
    """Two Markdown tables, per round: the phases, and the operators of each that took longest."""
    each = 1e3 / max(len(rounds), 1)
    whole = sum(phase.seconds for phase in phases.values()) or 1.0
    on_device = any(operator.device_s for phase in phases.values() for operator in phase.operators.values())
    lines = [
        f"# Profile of rank {rank}, {_named(rounds)}",
        "",
        "Milliseconds a round. Recording slows a round down, most where operators are small. Host time on a GPU is that"
        " of starting kernels.",
        "",
        "| phase | entered | ms | share | device ms |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, phase in phases.items():
        device = sum(operator.device_s for operator in phase.operators.values())
        lines.append(
            f"| {name} | {phase.entries / max(len(rounds), 1):g} | {phase.seconds * each:.2f} | "
            f"{phase.seconds / whole:.1%} | {_ms(device * each)} |"
        )
    lines += ["", "| phase | operator | calls | own ms | device ms |", "|---|---|---:|---:|---:|"]
    for name, phase in phases.items():
        heaviest = sorted(
            phase.operators.items(), key=lambda found: found[1].device_s if on_device else found[1].host_s, reverse=True
        )
        for operator_name, operator in heaviest[:OPERATORS]:
            lines.append(
                f"| {name} | {_cell(operator_name)} | {operator.calls / max(len(rounds), 1):g} | "
                f"{operator.host_s * each:.2f} | {_ms(operator.device_s * each)} |"
            )
    return "\n".join(lines) + "\n"


def _named(rounds: Sequence[int]) -> str:
    """Rounds as people count them, from 1."""
    if not rounds:
        return "no whole round"
    return f"round {rounds[0] + 1}" if len(rounds) == 1 else f"rounds {rounds[0] + 1} to {rounds[-1] + 1}"


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.2f}" if milliseconds else "-"


def _cell(name: str) -> str:
    """An operator's name for a cell of a table; a template's arguments are left out."""
    return name.split("<")[0].replace("|", "/")[:80]
