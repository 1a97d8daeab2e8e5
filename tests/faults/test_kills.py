"""SIGKILL at random instants of trainings on two ranks. benchmarks/kill_campaign.py repeats this hundreds of times."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.kill_campaign import campaign, small_training
from distvsd.config import Config
from tests.small_run import three_stages

# In the foreground a round is saved before the next one begins. In the background its save ends after the next report.
MOST_LOST = {False: 1, True: 2}


@pytest.mark.guarantee("G1", "G9")
@pytest.mark.parametrize("asynchronous", [False, True], ids=["foreground", "background"])
def test_a_kill_at_any_instant_loses_no_more_than_the_save_under_way_and_changes_no_bit(
    tmp_path: Path, prior: Path, figure: Callable[[str], None], asynchronous: bool
) -> None:
    """After kill -9 at a random instant of a training, the newest checkpoint is sound and holds the last save or the
    one before it. No rank hangs. The resumed training ends with the bits of an undisturbed one."""

    def config_in(run: Path) -> Config:
        return small_training(prior, run, asynchronous, rounds=6, **{"particles.count": 2})

    tally = campaign(tmp_path, config_in, kills=8, draw=random.Random(1), ranks=2)
    assert tally.kills >= 8 and len(tally.lost) == tally.kills, str(tally)
    assert (tally.unreadable, tally.hangs, tally.different) == (0, 0, 0), str(tally)
    assert max(tally.lost) <= MOST_LOST[asynchronous], f"{tally}: {tally.lost}"
    figure(str(tally))


@pytest.mark.guarantee("G1", "G9")
def test_a_kill_at_any_instant_of_three_stages_changes_no_bit(
    tmp_path: Path, prior: Path, figure: Callable[[str], None]
) -> None:
    """In a field, its mesh, its texture, and where one hands over to the next: the same, on two ranks."""

    def config_in(run: Path) -> Config:
        return three_stages(run, prior, **{"particles.count": 2, "checkpoint.asynchronous": "false"})

    tally = campaign(tmp_path, config_in, kills=8, draw=random.Random(2), ranks=2)
    assert tally.kills >= 8, str(tally)
    assert (tally.unreadable, tally.hangs, tally.different) == (0, 0, 0), str(tally)
    assert max(tally.lost) <= MOST_LOST[False], f"{tally}: {tally.lost}"
    figure(str(tally))
