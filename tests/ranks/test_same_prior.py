"""Ranks with different priors or different versions of a program are refused before the first round."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from distvsd.errors import ConfigError, DistvsdError
from distvsd.parallel.alike import Fact, refuse_unlike
from distvsd.parallel.world import World
from distvsd.run.train import train
from distvsd.testing.ranks import run_ranks
from tests.small_run import small_config


def scale_unet(prior: Path) -> None:
    file = prior / "unet/diffusion_pytorch_model.safetensors"
    save_file({name: value * 1.01 for name, value in load_file(file).items()}, file, {"format": "pt"})


def scale_codec(prior: Path) -> None:
    file = prior / "vae/config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"scaling_factor": config["scaling_factor"] * 1.01}))


def nothing(prior: Path) -> None:
    pass


@pytest.fixture
def refusals(tmp_path: Path, prior: Path) -> Callable[[Callable[[Path], None]], list[str]]:
    """The errors of two ranks, '' for a rank that trains. Each rank has a copy of `prior` in its working directory;
    `change` is applied to that of rank 1."""

    def start(change: Callable[[Path], None]) -> list[str]:
        for rank in range(2):
            shutil.copytree(prior, tmp_path / f"node-{rank}" / "prior")
        change(tmp_path / "node-1" / "prior")
        config = small_config(tmp_path / "run", Path("prior"), **{"schedule.rounds": 1})

        def attempt(world: World) -> str:
            os.chdir(tmp_path / f"node-{world.rank}")
            try:
                train(config)
            except DistvsdError as error:
                return f"{type(error).__name__}: {error}"
            return ""

        return run_ranks(attempt, 2)

    return start


@pytest.mark.parametrize("change", [scale_unet, scale_codec])
def test_ranks_with_different_priors_at_one_relative_path_are_refused_with_both_folders(
    change: Callable[[Path], None],
    refusals: Callable[[Callable[[Path], None]], list[str]],
    tmp_path: Path,
) -> None:
    one, other = refusals(change)
    assert one == other and one.startswith("ConfigError")
    for rank in range(2):
        assert f"(prior seen from {tmp_path}/node-{rank}) on rank {rank}" in one
    assert "version" not in one
    assert not list((tmp_path / "run").rglob("manifest.json"))


def test_copies_of_one_prior_in_different_folders_train(
    refusals: Callable[[Callable[[Path], None]], list[str]],
) -> None:
    assert refusals(nothing) == ["", ""]


def test_all_that_differs_is_told_at_once_with_the_ranks_that_hold_it() -> None:
    def compare(world: World) -> str:
        torch = "2.6.0" if world.rank == 3 else "2.13.0"
        prior = "abc" if world.rank in (0, 2) else "def"
        facts = {"version of torch": Fact(torch, torch), "prior": Fact(prior, f"{prior} in /node-{world.rank}")}
        facts["version of distvsd"] = Fact("1", f"1 on rank {world.rank}")
        with pytest.raises(ConfigError) as caught:
            refuse_unlike(world, facts)
        return str(caught.value)

    texts = run_ranks(compare, 5)
    assert len(set(texts)) == 1
    assert "version of torch is 2.13.0 on ranks 0-2, 4, 2.6.0 on rank 3" in texts[0]
    assert "prior is abc in /node-0 on ranks 0, 2, def in /node-1 on ranks 1, 3-4" in texts[0]
    assert "version of distvsd" not in texts[0]
