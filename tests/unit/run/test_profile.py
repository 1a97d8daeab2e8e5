"""`log.profile` in whole runs: it changes no bit, every stage and rank has its own, and a failure ends nothing."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from distvsd.parallel.world import World
from distvsd.run.contents import verify
from distvsd.run.train import train
from distvsd.testing.ranks import run_ranks
from tests.small_run import small_config, three_stages

PROFILED = {"log.profile": 1}


def digest_of(run: Path) -> str:
    return list(verify(run, True))[-1]


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "profile").iterdir()) if (run / "profile").exists() else []


def test_a_recorded_run_has_the_bits_of_one_that_was_not(tmp_path: Path, prior: Path) -> None:
    for name, changes in (("plain", {}), ("recorded", {"log.profile": 2})):
        assert train(small_config(tmp_path / name, prior, **changes)) == 0
    assert digest_of(tmp_path / "plain") == digest_of(tmp_path / "recorded")
    assert names(tmp_path / "plain") == []
    text = (tmp_path / "recorded/profile/rank-0.md").read_text()
    assert "rounds 3 to 4" in text  # of four: the last two
    for phase in ("render", "encode", "objective", "update", "score", "exchange", "watch"):
        assert f"| {phase} | " in text


@pytest.mark.parametrize(("ranks", "expected"), [("first", [0]), ("all", [0, 1])])
def test_the_first_rank_or_all_of_them_record(tmp_path: Path, prior: Path, ranks: str, expected: list[int]) -> None:
    config = small_config(tmp_path / "run", prior, **PROFILED, **{"log.profile_ranks": ranks})

    def work(world: World) -> int:
        return train(config)

    assert run_ranks(work, 2) == [0, 0]
    assert names(tmp_path / "run") == sorted(f"rank-{rank}{end}" for rank in expected for end in (".json.gz", ".md"))


def test_every_stage_has_a_profile_of_its_own(tmp_path: Path, prior: Path) -> None:
    assert train(three_stages(tmp_path / "run", prior, **PROFILED)) == 0
    for stage in ("1-nerf", "2-geometry", "3-texture"):
        assert names(tmp_path / "run/stages" / stage) == ["rank-0.json.gz", "rank-0.md"]
    assert names(tmp_path / "run") == []


def test_a_profile_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, prior: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run/profile/rank-0.md").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        assert train(small_config(tmp_path / "run", prior, **PROFILED)) == 0
    assert "no profile of rank 0" in caplog.text and "rank-0.md is a folder" in caplog.text
