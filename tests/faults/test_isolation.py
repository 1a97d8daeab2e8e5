"""A particle that is not finite or does not fit into memory changes no bit of the others.

A particle that keeps failing is quarantined. The tests run whole rounds on real ranks. In the reference run the
particle is absent from the faulty rounds by construction: its samples have weight 0, and the test restores its state.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distvsd.config import load_config
from distvsd.errors import DivergedError
from distvsd.faults import begin_round, injected
from distvsd.run.build import build_run
from distvsd.testing.ranks import run_ranks
from distvsd.vsd.samples import Samples

SMOKE = Path(__file__).parents[2] / "configs" / "smoke.yaml"
STRUCK, ROUND = 2, 1
# The particle has one fault in each of four rounds, a different one each time. The first and the last round have none.
HITS, ROUNDS = range(1, 5), 6


@pytest.fixture(scope="module")
def settings(prior):
    """Four particles with two views each. Every mechanism that could pass a NaN on to other particles is enabled."""

    def load(**overrides):
        chosen = {
            "run.seed": 41,
            "prior.path": prior,
            "prompt": "a red cube",
            "particles.count": 4,
            "particles.views": 2,
            "particles.nerf.samples_per_ray": 4,
            "particles.nerf.max_resolution": 8,
            "particles.nerf.base_resolution": 8,
            "particles.nerf.sparsity": 1,
            "render.resolution": 16,
            "score.replay_share": 0.2,
            "log.every": ROUNDS,
        } | overrides
        return load_config(SMOKE, [f"{key}={value}" for key, value in chosen.items()])

    return load


def absent(samples):
    """The reference: the samples of the struck particle have weight 0."""
    return dataclasses.replace(samples, weight=samples.weight * (samples.ids != STRUCK))


def infinite(samples):
    """Infinite latents with weight 0, as the encoder returns them after an overflow."""
    struck = samples.ids == STRUCK
    latents = samples.latents * torch.where(struck, torch.inf, 1.0).reshape(-1, 1, 1, 1)
    return dataclasses.replace(samples, latents=latents, weight=samples.weight * ~struck)


def one_view(samples):
    """Only the first of the particle's two views is not finite."""
    struck = torch.zeros(len(samples), dtype=torch.bool)
    struck[(samples.ids == STRUCK).nonzero().flatten()[:1]] = True
    latents = samples.latents * torch.where(struck, torch.nan, 1.0).reshape(-1, 1, 1, 1)
    return dataclasses.replace(samples, latents=latents, weight=samples.weight * ~struck)


def absurd(samples):
    """Finite latents with weight 1 that are too large for any network. Only the gradient shows the fault."""
    factors = torch.where(samples.ids == STRUCK, 1e30, 1.0).reshape(-1, 1, 1, 1)
    return dataclasses.replace(samples, latents=samples.latents * factors)


def one_number(samples):
    """A single number of the particle's latents is infinite."""
    latents = samples.latents.clone()
    latents[(samples.ids == STRUCK).nonzero().flatten()[:1], 0, 0, 0] = -torch.inf
    return dataclasses.replace(samples, latents=latents, weight=samples.weight * (samples.ids != STRUCK))


def rounds(world, config, plan: str, changes: dict[int, Callable]):
    """Every byte of this rank's state after ROUNDS rounds, by name. changes: a function of the samples, by round."""
    parts = build_run(config, world, lambda done: False)
    step = -1

    def encode(views, resolution):
        samples = parts.loop.encode(views, resolution)
        return changes[step](samples) if step in changes else samples

    loop = dataclasses.replace(parts.loop, encode=encode)
    found = {}
    with injected(plan):
        for step in range(ROUNDS):
            before = {name: value.clone() for name, value in parts.ensemble.state().get(STRUCK, {}).items()}
            done = loop.round(step)
            if changes.get(step) is absent:
                for name, value in parts.ensemble.state().get(STRUCK, {}).items():
                    value.copy_(before[name])
            elif step in HITS:
                assert done.update.unhealthy == [STRUCK] * bool(before), "exactly the struck particle must be unhealthy"
            else:
                assert not done.update.unhealthy, "all particles must be healthy in this round"
            found[f"round {step}"] = repr((done.lag, done.fit)).encode()
    for particle_id, tensors in parts.ensemble.state().items():
        found |= {f"particle {particle_id}: {name}": value.numpy().tobytes() for name, value in tensors.items()}
    for file, tensors in parts.training.state().items():
        found |= {f"{file}: {name}": value.numpy().tobytes() for name, value in tensors.items()}
    return found


def union(found):
    """The states of all ranks in one dictionary. Ranks must agree on the names that they share."""
    together = {}
    for of_rank in found:
        for name, value in of_rank.items():
            assert together.setdefault(name, value) == value, f"ranks disagree on {name}"
    return together


@pytest.fixture(scope="module")
def reference(settings):
    """The final state of a run without the particle in the struck rounds. With exact numerics it is trained on one
    rank."""

    @functools.cache
    def run(numerics, size):
        away = dict.fromkeys(HITS, absent)
        return union(run_ranks(rounds, size, settings(**{"parallel.numerics": numerics}), "", away))

    return lambda numerics, size: run(numerics, 1 if numerics == "exact" else size)


def expect_no_bit_changed(found, expected, figure):
    assert found.keys() == expected.keys()
    changed = {
        name: sum((one ^ other).bit_count() for one, other in zip(found[name], expected[name], strict=True))
        for name in expected
        if found[name] != expected[name]
    }
    assert not changed, changed
    for name, value in found.items():
        if "param/" in name or "adapter" in name:
            assert torch.frombuffer(bytearray(value), dtype=torch.float32).isfinite().all(), name
    figure(f"0 of {8 * sum(map(len, found.values())):,} bits changed elsewhere")


@pytest.mark.guarantee("G15")
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_a_particle_that_is_not_finite_changes_no_bit_of_anything_else(settings, reference, figure, numerics, size):
    """A particle whose render, latents, score output or gradient is not finite skips that round. Every other particle,
    the score network and all optimisers have the same bits as if the particle had been absent."""
    points = zip(("render", "latent", "score", "gradient"), HITS, strict=True)
    plan = "; ".join(f"nan@{point}:particle={STRUCK}:step={step}" for point, step in points)
    found = union(run_ranks(rounds, size, settings(**{"parallel.numerics": numerics}), plan, {}))
    expect_no_bit_changed(found, reference(numerics, size), figure)


@pytest.mark.guarantee("G15")
def test_infinite_half_finite_and_absurd_latents_are_as_harmless_as_nan(settings, reference, figure):
    """A particle changes no bit of the others if its latents are infinite, if one view or one number of them is not
    finite, or if they are so large that the network outputs overflow."""
    changes = dict(zip(HITS, (infinite, one_view, absurd, one_number), strict=True))
    found = union(run_ranks(rounds, 2, settings(**{"parallel.numerics": "exact"}), "", changes))
    expect_no_bit_changed(found, reference("exact", 2), figure)


@pytest.mark.guarantee("G18")
@pytest.mark.parametrize("size", [1, 2])
def test_a_particle_that_does_not_fit_into_memory_for_a_round_changes_no_bit_of_anything_else(
    settings, reference, figure, size
):
    """If the render of one particle runs out of memory, that particle skips the round and no bit of the others changes.
    This holds for exact numerics, which render each particle alone."""
    plan = "; ".join(f"oom@render:particle={STRUCK}:step={step}" for step in HITS)
    found = union(run_ranks(rounds, size, settings(**{"parallel.numerics": "exact"}), plan, {}))
    expect_no_bit_changed(found, reference("exact", size), figure)


def updates(world, config, plan, count):
    """This rank's updates and skipped score steps by round. Then its replayed ids, its groups, a checksum of the score
    network and its health records."""
    parts = build_run(config, world, lambda done: False)
    told = []
    with injected(plan):
        for step in range(count):
            done = parts.loop.round(step)
            told.append(dataclasses.asdict(done.update) | {"skipped": done.fit.skipped})
    network = [parameter.detach().numpy().tobytes() for parameter in parts.training.score.trainable.values()]
    kept = parts.training.replay.oldest()
    return {
        "rounds": told,
        "replayed": sorted(set(kept.ids.tolist())) if kept else [],
        "groups": [group.own for group in parts.ensemble.store.groups],
        "network": hashlib.sha256(b"".join(network)).hexdigest(),
        "finite": all(value.isfinite().all() for state in parts.ensemble.state().values() for value in state.values()),
        "health": parts.ensemble.health(),
    }


@pytest.mark.guarantee("G16")
def test_a_particle_that_keeps_failing_is_put_back_then_quarantined_and_the_run_goes_on(settings, figure):
    """After particles.health.max_bad bad rounds in a row a particle is restored to its last good state. After
    max_restores restores it is quarantined instead. The other particles and the score network continue to train."""
    limits = {"particles.health.max_bad": 2, "particles.health.max_restores": 1, "score.replay_rounds": 1}
    found = run_ranks(updates, 2, settings(**limits), f"nan@gradient:particle={STRUCK}", 6)
    ranks = {particle_id: of_rank for of_rank in found for particle_id in of_rank["health"]}
    owner = ranks[STRUCK]
    assert [told["restored"] for told in owner["rounds"]] == [[], [STRUCK], [], [], [], []]
    assert [told["quarantined"] for told in owner["rounds"]] == [[], [], [], [STRUCK], [], []]
    # It is bad in rounds 0 to 3. After that it is rendered, but neither updated nor counted.
    assert [told["unhealthy"] for told in owner["rounds"]] == [[STRUCK]] * 4 + [[]] * 2
    assert [told["absent"] for told in owner["rounds"]] == [[STRUCK]] * 6
    assert owner["health"][STRUCK] == {"bad": 0, "total": 4, "restores": 1, "quarantined": True, "good": "initial"}
    others = sorted(set(ranks) - {STRUCK})
    for step in range(6):
        assert sorted(id for of_rank in found for id in of_rank["rounds"][step]["healthy"]) == others
        assert all(of_rank["rounds"][step]["skipped"] == 0 for of_rank in found)
    assert all(of_rank["replayed"] == others and of_rank["finite"] for of_rank in found)
    assert len({of_rank["network"] for of_rank in found}) == 1
    figure("1 of 4 particles quarantined after 4 bad rounds; 3 of 3 others moved in 6 of 6 rounds")


@pytest.mark.guarantee("G18")
def test_out_of_memory_in_a_group_halves_it_and_every_particle_still_moves(settings):
    """A group of particles that does not fit into memory is rendered in halves for the rest of the run. The ranks stay
    synchronized."""
    found = run_ranks(updates, 2, settings(), "oom@render:rank=1:step=1:nth=1", 3)
    assert [of_rank["groups"] for of_rank in found] == [[[0, 1]], [[2], [3]]]
    assert all(
        told["healthy"] == own
        for own, of_rank in zip(([0, 1], [2, 3]), found, strict=True)
        for told in of_rank["rounds"]
    )
    assert len({of_rank["network"] for of_rank in found}) == 1


@pytest.mark.guarantee("G18")
def test_out_of_memory_in_a_backward_pass_costs_that_rank_the_round_and_nobody_hangs(settings):
    """If the backward pass of one rank runs out of memory, none of its particles is updated in that round. The ranks
    stay synchronized. The other ranks' particles and the score network continue to train."""
    found = run_ranks(updates, 2, settings(), "oom@gradient:rank=1:step=1", 3)
    assert [told["healthy"] for told in found[0]["rounds"]] == [[0, 1]] * 3
    assert [told["healthy"] for told in found[1]["rounds"]] == [[2, 3], [], [2, 3]]
    assert [told["absent"] for told in found[1]["rounds"]] == [[], [2, 3], []]
    assert found[1]["groups"] == [[2], [3]]
    assert len({of_rank["network"] for of_rank in found}) == 1


@pytest.mark.guarantee("G18")
def test_a_particle_that_never_fits_is_quarantined_and_the_others_train_on(settings, figure):
    """A particle that does not fit into memory even alone is quarantined, like one that is never finite."""
    limits = {"particles.health.max_bad": 2, "particles.health.max_restores": 0}
    found = run_ranks(updates, 2, settings(**limits), f"oom@render:particle={STRUCK}", 4)
    assert found[1]["health"][STRUCK]["quarantined"] and found[1]["groups"] == [[2], [3]]
    assert all(told["healthy"] == [3] for told in found[1]["rounds"])
    assert all(told["healthy"] == [0, 1] for told in found[0]["rounds"])
    assert all(told["skipped"] == 0 for of_rank in found for told in of_rank["rounds"])
    figure("1 of 4 particles quarantined, no rank waited for ever")


@pytest.mark.guarantee("G17")
def test_all_ranks_leave_out_the_same_score_step_when_one_ranks_gradient_is_not_finite(settings):
    """If the score gradient is not finite on one rank, all ranks skip that step. The replicas stay equal and training
    continues."""
    found = run_ranks(updates, 3, settings(), "nan@reduce:rank=1:step=1", 3)
    assert [[told["skipped"] for told in of_rank["rounds"]] for of_rank in found] == [[0, 1, 0]] * 3
    assert len({of_rank["network"] for of_rank in found}) == 1
    assert all(told["unhealthy"] == [] for of_rank in found for told in of_rank["rounds"])


def until_the_end(world, config, plan, change):
    """The text of the error that ends the run, its round, and the number of the score network's optimiser steps until
    then."""
    parts = build_run(config, world, lambda done: False)
    training = parts.loop.training
    for step in range(5):
        with injected(plan):
            begin_round(step)
            drawn = [parts.loop.encode(views, 16).detached() for views in parts.ensemble.render(step, 16)]
            samples = Samples.cat(drawn)
            gathered = parts.loop.exchange(change(samples) if step >= ROUND else samples, step)
            try:
                training.round(gathered, step)
            except DivergedError as error:
                return str(error), step, parts.training.score.local.num_steps
    raise AssertionError("the run should have ended")


@pytest.mark.guarantee("G17")
def test_a_score_that_stays_not_finite_ends_the_run_with_one_text_that_names_particle_round_and_timestep(settings):
    """After score.max_skipped skipped steps the run ends with the same error on every rank. The error names the
    particle, the round and the timestep."""
    found = run_ranks(until_the_end, 3, settings(**{"score.max_skipped": 2, "score.replay_share": 0}), "", absurd)
    texts, steps, taken = zip(*found, strict=True)
    assert set(steps) == {ROUND + 1} and set(taken) == {ROUND}
    assert len(set(texts)) == 1
    assert re.search(rf"2 optimiser steps .*score\.max_skipped.* round {ROUND + 2}\b", texts[0])
    named = re.search(rf"particle {STRUCK} at timestep (\d+), particle {STRUCK} at", texts[0])
    assert named and 0 <= int(named[1]) < 1000
    assert not re.search(rf"particle (?!{STRUCK}\b)\d+ at timestep", texts[0])


@pytest.mark.guarantee("G17")
def test_a_sum_that_stays_not_finite_says_that_no_particle_is_to_blame(settings):
    """If only the gradient sum of one rank is not finite and every loss is finite, the error names the sum over ranks
    and no particle."""
    plan, limits = "nan@reduce:rank=1", {"score.max_skipped": 2}
    found = run_ranks(until_the_end, 2, settings(**limits), plan, lambda samples: samples)
    assert found[0] == found[1]
    assert "sum over ranks" in found[0][0] and "particle" not in found[0][0]
