"""Whole trainings on several ranks: the number of ranks does not change the result."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from distvsd.config import load_config
from distvsd.looking.opened import load_particles
from distvsd.parallel.exchange import Exchange
from distvsd.parallel.world import World
from distvsd.run.build import build_run
from distvsd.run.contents import verify as verify_run
from distvsd.run.train import train
from distvsd.testing.ranks import run_ranks
from distvsd.vsd.samples import Samples

SMOKE = Path(__file__).parents[2] / "configs" / "smoke.yaml"
ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def config(run, prior, **overrides):
    settings = {
        "run.dir": run,
        "run.seed": 41,
        "prior.path": prior,
        "prompt": "a red cube",
        "particles.count": 7,
        "particles.nerf.samples_per_ray": 6,
        "particles.nerf.max_resolution": 16,
        "particles.nerf.base_resolution": 8,
        "render.resolution": 16,
        "schedule.rounds": 4,
        "checkpoint.every": 2,
        "score.replay_share": 0.25,
        "log.every": 2,
    } | overrides
    return load_config(SMOKE, [f"{key}={value}" for key, value in settings.items()])


def digests(run_dir):
    return dict(line.rsplit(" ", 1) for line in verify_run(Path(run_dir), digest=True) if len(line.split()[-1]) == 64)


@pytest.mark.guarantee("G10")
def test_exact_numerics_give_the_same_bits_on_one_to_four_ranks(tmp_path, prior):
    """7 particles on 1, 2, 3 and 4 ranks: every particle, the adapter, the camera and both optimisers have the same
    bits."""
    found = []
    for size in (1, 2, 3, 4):
        run = config(tmp_path / f"w{size}", prior, **{"parallel.numerics": "exact"})
        run_ranks(lambda world, run=run: train(run), size)
        found.append(digests(run.run.dir))
    assert len(found[0]) >= 7 + 4
    assert found[0] == found[1] == found[2] == found[3]


@pytest.mark.guarantee("G10")
def test_exact_numerics_hold_with_several_views_and_steps_a_round(tmp_path, prior):
    """Exact numerics give the same bits with several views per particle and several score steps per round as well."""
    found = []
    for size in (1, 3):
        run = config(
            tmp_path / f"w{size}",
            prior,
            **{
                "parallel.numerics": "exact",
                "particles.views": 2,
                "score.steps_per_round": 2,
                "score.batch_size": 5,
                "particles.count": 4,
            },
        )
        run_ranks(lambda world, run=run: train(run), size)
        found.append(digests(run.run.dir))
    assert found[0] == found[1]


def test_fast_numerics_agree_between_worlds_up_to_rounding(tmp_path, prior):
    """One round only, because rounding errors grow. Adam's first step has the size of the learning rate and the sign of
    the gradient, so a few parameters may differ by a whole step."""
    states = []
    for size in (1, 3):
        run = config(tmp_path / f"w{size}", prior, **{"schedule.rounds": 1})
        run_ranks(lambda world, run=run: train(run), size)
        restored = load_particles(Path(run.run.dir))
        states.append(torch.cat([v.flatten() for i in range(7) for v in restored.ensemble.parameters_of(i).values()]))
    different = (states[0] - states[1]).abs() > 1e-5
    assert different.float().mean() < 0.01


def test_more_ranks_than_particles_is_legal(tmp_path, prior):
    few = config(tmp_path / "few", prior, **{"particles.count": 2})
    run_ranks(lambda world: train(few), 3)
    assert len([name for name in digests(few.run.dir) if name.startswith("particle")]) == 2


@pytest.mark.guarantee("G10")
def test_a_rank_without_particles_follows_a_change_of_resolution(tmp_path, prior):
    """A rank without particles takes part with 0 rows. The shape of a row follows the current resolution."""
    found = []
    for size in (1, 3):
        changing = {"particles.count": 2, "render.resolution": "{0: 16, 2: 24}", "parallel.numerics": "exact"}
        run = config(tmp_path / f"w{size}", prior, **changing)
        run_ranks(lambda world, run=run: train(run), size)
        found.append(digests(run.run.dir))
    assert found[0] == found[1]
    lines = (Path(run.run.dir) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["resolution"] for line in lines] == [16, 24]


@pytest.mark.guarantee("G9", "G11")
def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path, prior):
    """Two rounds on two ranks and two more on three ranks give the same bits as four rounds on two ranks."""
    whole = config(tmp_path / "whole", prior, **{"parallel.numerics": "exact"})
    run_ranks(lambda world: train(whole), 2)
    parts = config(tmp_path / "parts", prior, **{"parallel.numerics": "exact"})
    half = dataclasses.replace(parts, schedule=dataclasses.replace(parts.schedule, rounds=2))
    run_ranks(lambda world: train(half), 2)
    run_ranks(lambda world: train(parts, resume="must"), 3)
    assert digests(whole.run.dir) == digests(parts.run.dir)
    rounds = [json.loads(line)["round"] for line in (Path(parts.run.dir) / "metrics.jsonl").read_text().splitlines()]
    assert rounds == [2, 4]


def score_gradient(world, run, samples, counts):
    """The first score gradient of a round, where each rank gives `counts[rank]` of the samples."""
    first = sum(counts[: world.rank])
    mine = samples[slice(first, first + counts[world.rank])]
    parts = build_run(run, world, lambda done: False)
    taken = []
    training = parts.training
    training.score.local.step = lambda gradient, rate: taken.append(gradient.clone())
    # The adapter's second factor begins at zero, and that makes the gradient of the first factor zero.
    for parameter in training.score.trainable.values():
        parameter.data += 0.01
    training.round(Exchange(world, counts).start(mine).wait(), 0)
    return taken[0]


@pytest.mark.guarantee("G13")
@pytest.mark.parametrize("counts", [(3, 1), (0, 4), (1, 0, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_score_gradient_of_all_ranks_is_that_of_one_rank_on_the_union(tmp_path, prior, counts, masked):
    """The score's gradient is that of one rank on all samples, with unequal and empty shares, and with a masked NaN."""
    run = config(tmp_path / "r", prior, **{"particles.count": 4, "score.replay_share": 0})
    generator = torch.Generator().manual_seed(0)
    samples = Samples(
        torch.randn(4, *build_run(run, ALONE, lambda done: False).prior.latent_shape(16), generator=generator),
        torch.randn(4, 16, generator=generator),
        torch.arange(4),
        torch.zeros(4, dtype=torch.int64),
        torch.tensor([1.0, 1.0, 0.0 if masked else 1.0, 1.0]),
    )
    if masked:
        samples.latents[2] = float("nan")
    expected = score_gradient(ALONE, run, samples, (4,))
    for gradient in run_ranks(score_gradient, len(counts), run, samples, counts):
        assert (gradient - expected).norm() / expected.norm() < 1e-5
