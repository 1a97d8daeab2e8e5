"""Makes docs/guarantees.md from the results of the marked tests: `python -m tests.guarantees FILE...`.

`pytest --guarantees FILE` writes the files. If several contain the same test, the last one counts. The marked tests are
found in the source code, so the page also lists those that did not run. The summary table is printed.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "guarantees.md"

FAMILIES: dict[str, dict[str, str]] = {
    "Durability": {
        "G1": "kill -9 of any rank at any instant of a save loses no more than the checkpoint being written.",
        "G2": "Saving a step whose folder already exists, complete or not, neither hangs nor mixes two states.",
        "G3": "Damage of a checkpoint is detected before any of its tensors is used.",
        "G4": "A resume uses the newest sound checkpoint and warns of damaged ones. With none sound, it is refused.",
        "G5": "A full or broken disk during a save does not end the run; old checkpoints stay; failures are counted.",
        "G6": "Old checkpoints are deleted only after the new one is published and verified; two complete ones stay.",
        "G7": "A save in the background contains the state of one moment, and all ranks learn of its failure.",
        "G8": "No file points to the newest checkpoint, so none can point to one that does not exist.",
    },
    "Exactness": {
        "G9": "A run that was killed and resumed ends with the same bits as an uninterrupted run.",
        "G10": "With exact numerics the number of ranks changes no bit.",
        "G11": "A run can be resumed on a different number of ranks.",
        "G12": "Exact numerics refuse a renderer that does not support them, and name it.",
        "G13": "The score's gradient over ranks equals that of one rank on all samples, for any shares and masks.",
        "G14": "A resume with a different configuration is refused, and the message names the differences.",
    },
    "Isolation": {
        "G15": "A particle that is not finite changes no bit of any other particle or of the score network.",
        "G16": "A particle that fails repeatedly is restored, and finally quarantined; the run continues.",
        "G17": "All ranks skip a score gradient that is not finite; too many of them end the run.",
        "G18": "If a group of particles runs out of memory, it is split, and the ranks stay in step.",
    },
    "Liveness": {
        "G19": "A dead rank ends the job within a bounded time, and the error names it.",
        "G20": "A hung rank ends the job within a bounded time, and the error names it.",
        "G21": "After a restart by the launcher the same command line resumes the run automatically.",
        "G22": "A warning names a slow rank.",
        "G23": "An error on one rank is raised on all ranks with the same message; no rank waits for another forever.",
    },
    "Preemption": {
        "G24": "After SIGTERM or SIGUSR1 on any rank, all ranks finish the round, save, and end with exit code 3.",
        "G26": "Killing the launcher leaves no orphaned ranks.",
    },
    "Telemetry": {
        "G27": "A tracker that is missing, slow, hung or broken neither delays the run nor makes it fail.",
        "G29": "After a kill and a resume metrics.jsonl contains every round exactly once.",
    },
    "Input safety": {
        "G30": "A mistake in a configuration is refused with its location and the probable correction.",
        "G31": "A run is refused if its ranks do not form the world that the launcher announced.",
        "G32": "No file of a checkpoint can run code, and none is read from outside its folder.",
        "G33": "No prompt is used as a path.",
        "G34": "A run directory has at most one job; a new job takes over the lock of a dead one.",
        "G35": "A resume with a different prior is refused.",
        "G36": "Checkpoints of earlier formats can be read; newer ones are refused, and the message says what to do.",
    },
}
# Listed only if a test is marked with it, because these guarantees depend on launchers of clusters and sweeps.
OPTIONAL = {
    "G25": "On Slurm a preempted job requeues itself and continues.",
    "G28": "The parameters of a sweep reach every rank.",
}
REQUIRED = {number for family in FAMILIES.values() for number in family}

Outcome = dict[str, Any]


@dataclass
class Proof:
    """A marked test: its place, its docstring as the promise, the outcomes of its cases, and measured figures."""

    file: str
    name: str
    promise: str
    numbers: tuple[str, ...]
    outcomes: list[str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)

    @property
    def result(self) -> str:
        for worst in ("failed", "skipped"):
            if worst in self.outcomes:
                return worst
        return "passed" if self.outcomes else "not run"


def marked_tests(root: Path = ROOT) -> list[Proof]:
    """Every test with `@pytest.mark.guarantee(...)`, ordered by file and line."""
    found = []
    for path in sorted((root / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and (numbers := _numbers(node)):
                promise = " ".join((ast.get_docstring(node) or "").split())
                found.append(Proof(str(path.relative_to(root)), node.name, promise, numbers))
    return found


def _numbers(test: ast.FunctionDef) -> tuple[str, ...]:
    numbers: list[str] = []
    for decorator in test.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.guarantee":
            numbers += [ast.literal_eval(argument) for argument in decorator.args]
    return tuple(numbers)


def with_outcomes(proofs: Iterable[Proof], recorded: dict[str, Outcome]) -> list[Proof]:
    """The same tests with the outcomes and figures of their cases."""
    known = {f"{proof.file}::{proof.name}": proof for proof in proofs}
    for case, outcome in recorded.items():
        if proof := known.get(case.partition("[")[0]):
            proof.outcomes.append(outcome["outcome"])
            proof.figures += [text for text in outcome["figures"] if text not in proof.figures]
    return list(known.values())


def page(proofs: list[Proof]) -> str:
    """The text of docs/guarantees.md."""
    cases = sum(len(proof.outcomes) for proof in proofs)
    told = [
        "# Guarantees",
        "",
        "What a run guarantees when something fails, and the tests of it. This page is made from their results:",
        "",
        "```sh",
        "python -m tests --guarantees FOLDER && python -m tests.guarantees FOLDER/*",
        "```",
        f"{len(proofs)} tests with {cases} cases, each with the result of its last run, on a CPU with gloo ranks.",
    ]
    for family, sentences in _families(proofs).items():
        told += ["", f"## {family}"]
        for number, sentence in sentences.items():
            told += ["", f"**{number}. {sentence}**", ""]
            told += [_line(proof) for proof in proofs if number in proof.numbers]
    return "\n".join(told) + "\n"


def _line(proof: Proof) -> str:
    cases = f", {len(proof.outcomes)} cases" if len(proof.outcomes) > 1 else ""
    figures = f" *{'; '.join(proof.figures)}*" if proof.figures else ""
    promise = f" {proof.promise}" if proof.promise else ""
    return f"- {proof.result}{cases}: `{proof.file}::{proof.name}`.{promise}{figures}"


def _families(proofs: list[Proof]) -> dict[str, dict[str, str]]:
    claimed = {number for proof in proofs for number in proof.numbers}
    more = {number: sentence for number, sentence in OPTIONAL.items() if number in claimed}
    return FAMILIES | ({"Clusters and sweeps": more} if more else {})


def summary(proofs: list[Proof]) -> str:
    """A table with one row per guarantee: its sentence, how many tests passed, and the first figures."""
    rows = ["| | guarantee | tests | measured |", "|---|---|---|---|"]
    for sentences in _families(proofs).values():
        for number, sentence in sentences.items():
            mine = [proof for proof in proofs if number in proof.numbers]
            outcomes = [outcome for proof in mine for outcome in proof.outcomes]
            passed = f"{outcomes.count('passed')} of {len(outcomes)} passed" if outcomes else "not run"
            figures = "; ".join([text for proof in mine for text in proof.figures][:2])
            rows.append(f"| {number} | {sentence.removesuffix('.')} | {passed} | {figures} |")
    return "\n".join(rows) + "\n"


def unproved(proofs: list[Proof]) -> list[str]:
    """The required guarantees without a test."""
    return sorted(
        REQUIRED - {number for proof in proofs for number in proof.numbers}, key=lambda number: int(number[1:])
    )


def unknown(proofs: list[Proof]) -> list[str]:
    """Numbers that tests are marked with and that are not defined here."""
    return sorted({number for proof in proofs for number in proof.numbers} - REQUIRED - OPTIONAL.keys())


def main(files: list[str]) -> int:
    if not files:
        print(__doc__, file=sys.stderr)
        return 2
    recorded: dict[str, Outcome] = {}
    for file in files:
        recorded |= json.loads(Path(file).read_text(encoding="utf-8"))
    proofs = with_outcomes(marked_tests(), recorded)
    PAGE.write_text(page(proofs), encoding="utf-8")
    print(summary(proofs))
    for complaint, numbers in (("without a test", unproved(proofs)), ("unknown", unknown(proofs))):
        if numbers:
            print(f"{complaint}: {', '.join(numbers)}", file=sys.stderr)
    bad = [proof.name for proof in proofs if proof.result in ("failed", "not run")]
    if bad:
        print(f"failed or not run: {', '.join(bad)}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
