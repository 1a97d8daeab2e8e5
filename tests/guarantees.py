"""Makes docs/guarantees.md from what the marked tests did: `python -m tests.guarantees FILE...`.

The files are written by `pytest --guarantees FILE`; several are united, the later ones win. Which tests are marked is
read from their source, so that one that did not run is said not to have run. The short table for the README is printed.
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
        "G2": "Coming again to a step whose folder exists, whole or not, neither hangs nor mixes two states.",
        "G3": "Damage of a checkpoint is found before any of its tensors is used.",
        "G4": "A damaged checkpoint is passed over for the newest sound one, with a warning; never a silent new start.",
        "G5": "A full or broken disk during a save does not end the run; old checkpoints stay, failures are counted.",
        "G6": "Old checkpoints go only after the new one is published and verified; two complete ones stay.",
        "G7": "A save in the background holds the state of one moment, and its failure is known to all ranks.",
        "G8": "There is no pointer that could name a checkpoint that is not on the disk.",
    },
    "Exactness": {
        "G9": "A run that was killed and resumed ends with the bits of one that was not.",
        "G10": "With exact numerics the number of ranks changes no bit.",
        "G11": "A run saved by some ranks goes on with another number of ranks.",
        "G12": "Exact numerics refuse a renderer that cannot keep them, by name.",
        "G13": "The score's gradient over ranks is that of one rank on all samples, with unequal shares and masks too.",
        "G14": "A resume with another configuration is refused with what differs.",
    },
    "Isolation": {
        "G15": "A particle that is not finite changes no bit of any other particle or of the score network.",
        "G16": "A particle that fails again and again is restored, at last quarantined; the run goes on.",
        "G17": "A score gradient that is not finite is skipped by all ranks together; too often, it ends the run.",
        "G18": "One particle's lack of memory is met by smaller groups and does not bring ranks out of step.",
    },
    "Liveness": {
        "G19": "A dead rank ends the job within bounded time, and is named.",
        "G20": "A hung rank ends the job within bounded time, and is named.",
        "G21": "A restart by the launcher resumes by itself, with the same command line.",
        "G22": "A slow rank is named.",
        "G23": "What goes wrong on one rank is raised on all, in the same words; no rank waits for another for ever.",
    },
    "Preemption": {
        "G24": "SIGTERM or SIGUSR1 on any one rank: all finish the round, save, and end with a code of their own.",
        "G26": "Killing the launcher leaves no orphans.",
    },
    "Telemetry": {
        "G27": "A tracker that is missing, slow, hung or broken delays and fails nothing.",
        "G29": "metrics.jsonl has every round once after kill and resume.",
    },
    "Input safety": {
        "G30": "A mistake in a configuration is refused with its place and what was probably meant.",
        "G31": "A world that is not the one the launcher promised is refused.",
        "G32": "No file of a checkpoint can run code or be read from outside its folder.",
        "G33": "No prompt becomes a path.",
        "G34": "A run directory has one job; the lock of a dead one is taken over.",
        "G35": "A resume against another prior is refused.",
        "G36": "Checkpoints of earlier formats are read, newer ones are refused with what to do.",
    },
}
# Proved where it belongs to a launcher of a cluster or a sweep, and listed when a test claims it.
OPTIONAL = {
    "G25": "On SLURM a preempted job puts itself back into the queue and goes on.",
    "G28": "The parameters of a sweep reach every rank.",
}
REQUIRED = {number for family in FAMILIES.values() for number in family}

Outcome = dict[str, Any]


@dataclass
class Proof:
    """A marked test: where, what it promises, how its cases ended, what it measured."""

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
    """Every test with `@pytest.mark.guarantee(...)` in the sources, in their order."""
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
    """The same tests, with what their cases did."""
    known = {f"{proof.file}::{proof.name}": proof for proof in proofs}
    for case, outcome in recorded.items():
        if proof := known.get(case.partition("[")[0]):
            proof.outcomes.append(outcome["outcome"])
            proof.figures += [text for text in outcome["figures"] if text not in proof.figures]
    return list(known.values())


def page(proofs: list[Proof]) -> str:
    """docs/guarantees.md."""
    cases = sum(len(proof.outcomes) for proof in proofs)
    told = [
        "# Guarantees",
        "",
        "What a run keeps to when something goes wrong, and the tests that try it. Their results make this page:",
        "",
        "```sh",
        "python -m pytest tests --guarantees guarantees.json && python -m tests.guarantees guarantees.json",
        "```",
        f"{len(proofs)} tests with {cases} cases, as they ended when the page was made, on a CPU and gloo ranks.",
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
    """A row a guarantee: sentence, tests and how they ended, the first figures."""
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
    """Guarantees without a test."""
    return sorted(
        REQUIRED - {number for proof in proofs for number in proof.numbers}, key=lambda number: int(number[1:])
    )


def unknown(proofs: list[Proof]) -> list[str]:
    """Numbers that tests claim and this file does not know."""
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
