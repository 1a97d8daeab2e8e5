"""Whole trainings whose particles take turns: the same bits on any number of ranks, after kills, wherever pages are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from distvsd.checkpoint.reader import newest, steps
from distvsd.config import Config
from distvsd.errors import RankError
from distvsd.faults import injected
from distvsd.run.contents import verify
from distvsd.run.train import train
from distvsd.testing.ranks import run_ranks
from tests.small_run import refusals, small_config, three_stages

# Seven particles in three turns; after eight rounds 0, 3 and 6 and 1 and 4 have moved three times, 2 and 5 twice. The
# good states of round 3 are not those of any save.
PAGED = {"particles.count": 7, "particles.resident": 3, "particles.host": 3, "schedule.rounds": 8, "score.rank": 2}
PAGED |= {"particles.health.good_every": 3, "log.every": 8, "score.replay_share": 0.25}


def paged(run: Path, prior: Path, **changes: Any) -> Config:
    return small_config(run, prior, **{**PAGED, **changes})


def digests(run: Path) -> list[str]:
    return verify(run, digest=True)


def events(run: Path) -> list[tuple[int, str]]:
    lines = [json.loads(line) for line in (run / "health.jsonl").read_text().splitlines()]
    return [(line["particle"], line["event"]) for line in lines]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, prior: Path) -> list[str]:
    """Of an uninterrupted run on one rank with all pages in memory."""
    run = tmp_path_factory.mktemp("reference") / "run"
    run_ranks(lambda world: train(paged(run, prior, **{"particles.host": 0})), 1)
    assert not (run / "pages").exists()
    checkpoint = newest(run / "checkpoints")
    assert checkpoint is not None
    states = [checkpoint.read(f"particles/{own:06d}.safetensors") for own in range(7)]
    assert [int(state["adam_step"]) for state in states] == [3, 3, 2, 3, 3, 2, 3]
    return digests(run)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("host", [1, 3])
def test_a_paged_run_has_the_same_bits_on_any_number_of_ranks_and_wherever_its_pages_are(
    tmp_path: Path, prior: Path, reference: list[str], size: int, host: int
) -> None:
    run = tmp_path / "run"
    assert run_ranks(lambda world: train(paged(run, prior, **{"particles.host": host})), size) == [0] * size
    assert digests(run) == reference
    assert not (run / "pages").exists()


@pytest.mark.parametrize(("first", "then"), [(1, 1), (2, 3), (3, 2)])
def test_a_paged_run_that_was_killed_goes_on_from_its_checkpoint_and_ignores_what_is_left_of_its_pages(
    tmp_path: Path, prior: Path, reference: list[str], first: int, then: int
) -> None:
    run = tmp_path / "run"
    with injected("kill@round:step=7"), pytest.raises(RankError, match="exit code -9"):
        run_ranks(lambda world: train(paged(run, prior)), first)
    left = sorted((run / "pages").rglob("*.safetensors"))
    assert left and steps(run / "checkpoints")
    for page in left:
        page.write_bytes(b"not of this run")
    assert run_ranks(lambda world: train(paged(run, prior, **{"particles.host": 1})), then) == [0] * then
    assert digests(run) == reference


@pytest.mark.parametrize("size", [1, 2])
def test_a_page_that_is_lost_before_its_particle_moved_since_the_save_costs_nothing(
    tmp_path: Path, prior: Path, reference: list[str], size: int
) -> None:
    """Particle 2 moves in rounds 3 and 6. It is read for round 3, for the save after round 4, and for round 6."""
    run = tmp_path / "run"
    config = paged(run, prior, **{"particles.host": 1})
    with injected("eio@page.read:particle=2:nth=3"):
        assert run_ranks(lambda world: train(config), size) == [0] * size
    assert digests(run) == reference
    assert [own for own, event in events(run) if "the same state was read again" in event] == [2]


@pytest.mark.parametrize("size", [1, 2])
def test_a_page_that_is_lost_after_its_particle_moved_is_that_of_the_checkpoint_and_is_told(
    tmp_path: Path, prior: Path, size: int
) -> None:
    """With saves after rounds 3 and 6 only, particle 1 is read for rounds 2, 5 and 8, and for both saves. It was saved
    after round 3; the page of round 5 is lost when the save after round 6 asks for it."""
    run = tmp_path / "run"
    config = paged(run, prior, **{"particles.host": 1, "checkpoint.every": 3})
    with injected("eio@page.read:particle=1:nth=4"):
        assert run_ranks(lambda world: train(config), size) == [0] * size
    assert (1, "its page on the disk was lost; went back to its last saved state") in events(run)
    checkpoint = newest(run / "checkpoints")
    assert checkpoint is not None
    steps_of = [int(checkpoint.read(f"particles/{own:06d}.safetensors")["adam_step"]) for own in range(7)]
    assert steps_of == [3, 2, 2, 3, 3, 2, 3]


def test_a_full_disk_under_the_pages_costs_nothing(tmp_path: Path, prior: Path, reference: list[str]) -> None:
    run, small = tmp_path / "run", tmp_path / "disk"
    small.mkdir()
    config = paged(run, prior, **{"particles.host": 1, "particles.page_dir": small})
    with injected("enospc@page.write:particle=2:nth=2;enospc@page.write:particle=2:nth=3"):
        run_ranks(lambda world: train(config), 1)
    assert digests(run) == reference
    assert list(small.iterdir()) == []


def test_what_does_not_fit_is_refused_on_every_rank_before_the_first_round(
    tmp_path: Path, prior: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    texts = refusals(paged(tmp_path / "a", prior, **{"particles.page_dir": gone}), 2)
    assert len(set(texts)) == 1 and f"particles.page_dir is {gone}, which is not a folder" in texts[0]
    monkeypatch.setattr("distvsd.run.build.shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, 10_000))
    texts = refusals(paged(tmp_path / "b", prior, **{"particles.host": 1}), 2)
    assert len(set(texts)) == 1 and "to be kept in files need" in texts[0] and "enough for 0" in texts[0]
    with injected("enospc@page.write:rank=1:nth=2"):
        monkeypatch.undo()
        texts = refusals(paged(tmp_path / "c", prior, **{"particles.host": 1}), 2)
    assert len(set(texts)) == 1 and "No space left on device" in texts[0] and "particles.page_dir" in texts[0]
    assert not (tmp_path / "c" / "metrics.jsonl").exists()


def test_stages_hand_paged_particles_over(tmp_path: Path, prior: Path) -> None:
    changes = {"particles.count": 4, "particles.resident": 2, "particles.host": 1, "checkpoint.every": 1}
    found = []
    for size in (1, 2):
        run = tmp_path / f"on-{size}"
        config = three_stages(run, prior, **changes)
        assert run_ranks(lambda world, config=config: train(config), size) == [0] * size
        found.append(digests(run))
    assert found[0] == found[1]


def test_a_paged_run_may_spread_its_score_network(tmp_path: Path, prior: Path) -> None:
    changes = {"parallel.numerics": "fast", "parallel.strategy": "fsdp2", "particles.host": 1}
    run = tmp_path / "run"
    assert run_ranks(lambda world: train(paged(run, prior, **changes)), 3) == [0] * 3
    assert digests(run)
