"""Short forms of all fuzz campaigns, and tests of the harness."""

from __future__ import annotations

import importlib
import random
import time
from pathlib import Path

import pytest

from distvsd.errors import ConfigError
from tests.fuzz.harness import campaign

COUNTS = {"configurations": 400, "overrides": 300, "prior_folders": 20, "checkpoints": 40}
HERE = Path(__file__).parent


@pytest.mark.parametrize("kind", [kind for kind in COUNTS if (HERE / f"{kind}.py").exists()])
def test_random_bad_input_never_ends_in_a_traceback_or_a_hang(kind: str) -> None:
    attempt = importlib.import_module(f"tests.fuzz.{kind}").attempt
    tally = campaign(attempt, 0, COUNTS[kind], seed=1)
    assert not tally.findings, "\n".join(tally.findings[:3])
    # If all cases were refused or all were accepted, the campaign would test one branch only.
    assert tally.refused and tally.accepted, str(tally)


def test_a_campaign_counts_what_each_case_became() -> None:
    def attempt(draw: random.Random, folder: Path) -> None:
        match folder.is_dir() and next(numbers):
            case 0:
                raise ConfigError("refused")
            case 1:
                raise KeyError("a traceback")
            case 2:
                time.sleep(60)
            case 3:
                bytearray(2**40)

    numbers = iter(range(5))
    tally = campaign(attempt, 0, 5, limit_s=0.2)
    assert (tally.cases, tally.refused, tally.accepted) == (5, 1, 1)
    assert [text.split(":")[0] for text in tally.tracebacks] == ["case 1", "case 3"]
    assert "KeyError" in tally.tracebacks[0] and "MemoryError" in tally.tracebacks[1]
    assert [text.split(":")[0] for text in tally.hangs] == ["case 2"]


def test_a_case_is_made_again_by_its_number() -> None:
    drawn: list[float] = []
    campaign(lambda draw, folder: drawn.append(draw.random()), 0, 4, seed=7)
    campaign(lambda draw, folder: drawn.append(draw.random()), 2, 3, seed=7)
    assert len(set(drawn[:4])) == 4 and drawn[4] == drawn[2]
