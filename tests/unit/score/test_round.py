"""One round of the score network: how many steps, on what, at which rate, and what is left out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from distvsd.errors import DivergedError
from distvsd.score.lora import LoraScore
from distvsd.score.training import LAG_SAMPLES, Fit
from distvsd.vsd.samples import Samples

from .conftest import OneRank, Sum, draw, training


def union_of(count: int, lane: int = 2, size: int = 8) -> Samples:
    """One render of each of `count` particles; the renders of another lane differ."""
    return Samples(
        draw(lane, count, 4, size, size),
        draw(lane + 50, count, 16),
        torch.arange(count),
        torch.zeros(count, dtype=torch.int64),
        torch.ones(count),
    )


def seen_by(score: LoraScore, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Samples, Tensor, Tensor, Tensor]]:
    """A list that gets the arguments of every call of `gradients`: samples, timesteps, noise, kept cameras."""
    calls: list[tuple[Samples, Tensor, Tensor, Tensor]] = []
    original = score.gradients

    def gradients(samples: Samples, timesteps: Tensor, noise: Tensor, keep: Tensor, *rest: Any) -> Any:
        calls.append((samples, timesteps, noise, keep))
        return original(samples, timesteps, noise, keep, *rest)

    monkeypatch.setattr(score, "gradients", gradients)
    return calls


def flat(score: LoraScore) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in score.trainable.values()])


def test_k_steps_draw_fresh_times_and_noise_for_the_same_samples(unet, make_score, monkeypatch) -> None:
    score, reduce = make_score(unet, shaken=True), OneRank()
    calls = seen_by(score, monkeypatch)
    fit = training(score, reduce, steps_per_round=3).round(union_of(5), 7)
    assert score.local.num_steps == 3 and len(reduce.gradients) == 3 and fit.skipped == 0
    assert all(torch.equal(samples.latents, union_of(5).latents) for samples, *_ in calls)
    noises = [noise for _, _, noise, _ in calls]
    assert not torch.equal(noises[0], noises[1]) and not torch.equal(noises[1], noises[2])
    assert len({tuple(timesteps.tolist()) for _, timesteps, _, _ in calls}) == 3


def test_the_first_step_is_the_gradient_of_the_mean_loss_and_the_fit_its_value(unet, make_score, monkeypatch) -> None:
    score, reduce = make_score(unet, shaken=True), OneRank()
    calls = seen_by(score, monkeypatch)
    twin = make_score(unet, shaken=True)
    fit = training(score, reduce).round(union_of(5), 7)
    loss = twin.loss(*calls[0]).mean()
    expected = torch.autograd.grad(loss, list(twin.trainable.values()))
    assert fit.loss == pytest.approx(loss.item(), rel=1e-6)
    assert torch.allclose(reduce.gradients[0], torch.cat([g.flatten() for g in expected]), atol=1e-6)


def test_times_cover_the_whole_range_and_not_that_of_the_particles(unet, make_score, monkeypatch) -> None:
    score = make_score(unet)
    calls = seen_by(score, monkeypatch)
    step = training(score, OneRank(), steps_per_round=8)
    step.round(union_of(64, size=2), 0)
    times = torch.cat([timesteps for _, timesteps, _, _ in calls])
    assert times.min() < 5 and times.max() > 94  # of 0..99, 512 draws: fails with probability 1e-11


def test_cameras_are_dropped_with_the_given_probability(unet, make_score, monkeypatch) -> None:
    score = make_score(unet)
    calls = seen_by(score, monkeypatch)
    for drop in (0.0, 0.25, 1.0):
        training(score, OneRank(), steps_per_round=8, camera_drop=drop).round(union_of(64, size=2), 0)
    kept = [torch.cat([keep for *_, keep in calls[first : first + 8]]).float().mean().item() for first in (0, 8, 16)]
    assert kept[0] == 1 and kept[2] == 0
    assert kept[1] == pytest.approx(0.75, abs=4 * (0.25 * 0.75 / 512) ** 0.5)


def test_the_steps_of_a_round_deal_its_renders_among_them_anew_each_round(unet, make_score, monkeypatch) -> None:
    score = make_score(unet)
    calls = seen_by(score, monkeypatch)
    step, union = training(score, OneRank(), steps_per_round=3, batch_size=3), union_of(7, size=2)
    dealt = []
    for number in range(2):
        calls.clear()
        step.round(union, number)
        batches = [samples.ids.tolist() for samples, *_ in calls]
        assert [len(batch) for batch in batches] == [3, 3, 3]
        # Nine places for seven renders: all seven, then the first two of the order again.
        order = [particle for batch in batches for particle in batch]
        assert sorted(order[:7]) == list(range(7)) and order[7:] == order[:2]
        for samples, *_ in calls:  # whole rows, not only their ids
            assert torch.equal(samples.latents, union.latents[samples.ids])
        dealt.append(order)
    assert dealt[0] != dealt[1]


def test_only_sound_renders_are_dealt(unet, make_score, monkeypatch) -> None:
    score, union = make_score(unet), union_of(6, size=2)
    union.weight[[0, 2, 3, 5]] = 0
    calls = seen_by(score, monkeypatch)
    fit = training(score, OneRank(), steps_per_round=4, batch_size=1, max_skipped=1).round(union, 0)
    assert fit.skipped == 0
    ids = [samples.ids.tolist() for samples, *_ in calls]
    assert sorted(ids) == [[1], [1], [4], [4]] and ids[:2] == ids[2:]


def test_a_step_is_never_larger_than_its_batch_however_few_renders_are_sound(unet, make_score, monkeypatch) -> None:
    score, union = make_score(unet), union_of(8, size=2)
    calls = seen_by(score, monkeypatch)
    step = training(score, OneRank(), batch_size=4)
    union.weight[:5] = 0
    step.round(union, 0)
    assert [samples.ids.tolist() for samples, *_ in calls] == [[5, 6, 7]]
    union.weight.zero_()
    assert step.round(union, 1).skipped == 1 and len(calls) == 1


def test_a_batch_as_large_as_the_round_or_larger_is_the_round_as_it_is(unet, make_score, monkeypatch) -> None:
    score = make_score(unet)
    calls = seen_by(score, monkeypatch)
    for size in (5, 6):
        training(score, OneRank(), batch_size=size).round(union_of(5, size=2), 0)
    assert [samples.ids.tolist() for samples, *_ in calls] == [list(range(5))] * 2


def test_the_replayed_share_is_one_of_the_step_and_not_of_the_round(unet, make_score, monkeypatch) -> None:
    score = make_score(unet)
    step = training(score, OneRank(), batch_size=4, replay_share=0.5)
    step.round(union_of(8, size=2), 0)
    calls = seen_by(score, monkeypatch)
    step.round(union_of(8, size=2), 1)
    assert [len(samples) for samples, *_ in calls] == [8]


def test_each_rank_trains_on_its_slice_with_the_draws_of_its_rows(unet, make_score, monkeypatch) -> None:
    """So the sum over ranks does not depend on their number."""
    whole_score, part_score = make_score(unet, shaken=True), make_score(unet, shaken=True)
    whole, part = seen_by(whole_score, monkeypatch), seen_by(part_score, monkeypatch)
    reduces = [OneRank() for _ in range(3)]
    training(whole_score, reduces[0]).round(union_of(5), 4)
    training(part_score, reduces[1], lambda n: slice(0, 2)).round(union_of(5), 4)
    other = make_score(unet, shaken=True)
    training(other, reduces[2], lambda n: slice(2, n)).round(union_of(5), 4)
    for ours, theirs in zip(part[0][1:], whole[0][1:], strict=True):
        assert torch.equal(ours, theirs[:2])
    assert [reduce.rows for reduce in reduces] == [[5], [2], [3]]
    summed = reduces[1].gradients[0] + reduces[2].gradients[0]
    assert torch.allclose(summed, reduces[0].gradients[0], atol=1e-6)


def test_a_share_of_each_batch_comes_from_earlier_rounds(unet, make_score, monkeypatch) -> None:
    score = make_score(unet)
    calls = seen_by(score, monkeypatch)
    step = training(score, OneRank(), replay_share=0.25)
    step.round(union_of(6), 0)
    step.round(union_of(6, lane=20), 1)
    first, second = calls[0][0], calls[1][0]
    assert len(first) == 6  # nothing was kept before
    assert len(second) == 8  # 2 of 8 are a quarter
    assert torch.equal(second.latents[:6], union_of(6, lane=20).latents)
    old = union_of(6).latents
    assert all(any(torch.equal(row, kept) for kept in old) for row in second.latents[6:])
    assert step.replay.rounds == [0, 1]


def test_without_a_share_nothing_is_replayed_but_kept_for_the_lag(unet, make_score, monkeypatch) -> None:
    score = make_score(unet)
    calls = seen_by(score, monkeypatch)
    step = training(score, OneRank(), replay_rounds=2)
    for number in range(4):
        step.round(union_of(3, lane=number), number)
    assert [len(samples) for samples, *_ in calls] == [3, 3, 3, 3]
    assert step.replay.rounds == [2, 3]


def test_renders_of_another_resolution_are_not_replayed(unet, make_score, monkeypatch) -> None:
    score = make_score(unet)
    calls = seen_by(score, monkeypatch)
    step = training(score, OneRank(), replay_share=0.5)
    step.round(union_of(3, size=4), 0)
    step.round(union_of(3, size=8), 1)
    step.round(union_of(3, size=8), 2)
    assert [len(samples) for samples, *_ in calls] == [3, 3, 6]
    assert step.replay.rounds == [1, 2]


def test_a_step_that_is_not_finite_is_left_out_and_counted(unet, make_score) -> None:
    score, reduce = make_score(unet, shaken=True), OneRank()
    before, calls = flat(score), iter(range(9))

    def second_fails(vectors: Sequence[Tensor], *, extra_sums: Tensor) -> Sum:
        reduced = reduce(vectors, extra_sums=extra_sums)
        return Sum(reduced.gradient * math.nan, reduced.sums, False) if next(calls) == 1 else reduced

    fit = training(score, second_fails, steps_per_round=3).round(union_of(4), 0)
    assert fit.skipped == 1 and math.isfinite(fit.loss)
    assert score.local.num_steps == 2
    assert flat(score).isfinite().all() and not torch.equal(flat(score), before)


def test_steps_left_out_in_a_row_end_the_run_and_the_text_names_particle_round_and_timestep(
    unet, make_score, monkeypatch
) -> None:
    """Row 5 has finite latents, but the square of its velocity is not finite."""
    score, asked = make_score(unet, "v_prediction", shaken=True), []
    calls = seen_by(score, monkeypatch)
    before, union = flat(score), union_of(6)
    union.latents[5] = 1e30

    def gather(report: list[Any]) -> list[Any]:
        asked.append(report)
        return [[[], True], report]

    step = training(score, OneRank(), max_skipped=3)
    step.gather = gather
    assert [step.round(union, number).skipped for number in (10, 11)] == [1, 1]
    assert not asked
    with pytest.raises(DivergedError) as caught:
        step.round(union, 12)
    timestep = int(calls[-1][1][5])
    assert "last 3 optimiser steps" in str(caught.value) and "round 13" in str(caught.value)
    assert f"particle 5 at timestep {timestep}." in str(caught.value)
    assert asked == [[[[5, timestep]], False]]
    assert torch.equal(flat(score), before) and score.local.num_steps == 0


def test_a_step_that_is_taken_ends_the_count(unet, make_score) -> None:
    score, reduce = make_score(unet, shaken=True), OneRank()
    usable = iter([False, False, True, False, False, False])

    def at_times(vectors: Sequence[Tensor], *, extra_sums: Tensor) -> Sum:
        return dataclasses.replace(reduce(vectors, extra_sums=extra_sums), usable=next(usable))

    step = training(score, at_times, max_skipped=3)
    for number in range(5):
        step.round(union_of(4), number)
    assert step.left_out == 2
    with pytest.raises(DivergedError, match="sum over ranks was not"):
        step.round(union_of(4), 5)


def test_rounds_without_a_single_valid_sample_end_the_run_too(unet, make_score) -> None:
    step, union = training(make_score(unet), OneRank(), max_skipped=2), union_of(3)
    union.weight.zero_()
    step.round(union, 0)
    with pytest.raises(DivergedError, match="round 2: no render of any particle"):
        step.round(union, 1)


def test_a_gradient_that_overflows_behind_a_finite_loss_is_blamed_on_its_rank(unet, make_score, monkeypatch) -> None:
    score = make_score(unet, shaken=True)
    original = score.gradients

    def overflows(*arguments: Any) -> Any:
        vectors, losses = original(*arguments)
        return [vector * math.inf for vector in vectors], losses

    monkeypatch.setattr(score, "gradients", overflows)
    step = training(score, OneRank(), max_skipped=1)
    step.gather = lambda report: [[[], True], report]
    with pytest.raises(DivergedError, match="gradient was not on rank 1"):
        step.round(union_of(3), 0)


def test_without_a_share_only_what_the_lag_looks_at_is_kept(unet, make_score) -> None:
    """The lag must be the same number as where everything is kept, as a replay share above zero requires."""
    many = Samples.cat([union_of(8, lane=lane, size=2) for lane in range(LAG_SAMPLES // 8 + 3)])
    many.weight[3] = 0.0
    later = Samples.cat([union_of(8, lane=lane + 20, size=2) for lane in range(LAG_SAMPLES // 8 + 3)])
    little, whole = make_score(unet, shaken=True), make_score(unet, shaken=True)
    steps = training(little, OneRank()), training(whole, OneRank(), replay_share=0.01)
    for step in steps:
        step.round(many, 0)
    assert [len(step.replay) for step in steps] == [LAG_SAMPLES, len(many) - 1]
    lags = [step.lag(later, 1) for step in steps]
    assert lags[0] is not None and lags[0] == lags[1] != 0


def test_masked_samples_change_neither_gradient_nor_loss(unet, make_score) -> None:
    clean, poisoned = union_of(5), union_of(5)
    clean.weight[2] = poisoned.weight[2] = 0.0
    poisoned.latents[2] = math.nan
    poisoned.cameras[2] = math.inf
    found: list[tuple[Fit, Tensor]] = []
    for union in (clean, poisoned):
        score = make_score(unet, shaken=True)
        step = training(score, OneRank())
        found.append((step.round(union, 0), flat(score)))
        assert len(step.replay) == 4
    assert found[0][0] == found[1][0] and found[0][0].skipped == 0
    assert torch.equal(found[0][1], found[1][1])


def test_a_round_without_a_valid_sample_moves_nothing_and_calls_nobody(unet, make_score) -> None:
    union = union_of(3)
    union.weight.zero_()
    score, reduce = make_score(unet, shaken=True), OneRank()
    before = flat(score)
    step = training(score, reduce, steps_per_round=2)
    fit = step.round(union, 0)
    assert math.isnan(fit.loss) and fit.skipped == 2
    assert not reduce.gradients and torch.equal(flat(score), before) and len(step.replay) == 0


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1.0), ("sqrt", 3.0), ("linear", 9.0)])
def test_the_rate_grows_with_the_batch_as_asked(unet, make_score, monkeypatch, scaling: str, factor: float) -> None:
    score = make_score(unet)
    rates: list[float] = []
    monkeypatch.setattr(score.local, "step", lambda gradient, rate: rates.append(rate))
    training(score, OneRank(), learning_rate_scaling=scaling).round(union_of(9, size=2), 0)
    assert rates == [pytest.approx(1e-2 * factor)]


def test_the_lag_needs_something_older_and_is_zero_for_the_same_renders(unet, make_score) -> None:
    score = make_score(unet, shaken=True)
    step = training(score, OneRank())
    assert step.lag(union_of(4), 0) is None
    step.round(union_of(4), 0)
    assert step.lag(union_of(4), 1) == 0
    other = step.lag(union_of(4, lane=20), 1)
    assert other is not None and other != 0
    assert step.lag(union_of(4, size=4), 1) is None  # another resolution cannot be compared


def test_the_lag_is_positive_for_renders_the_score_was_not_trained_on(unet, make_score) -> None:
    """After long training on old renders their loss is lower than that of new renders of the same kind."""
    score = make_score(unet, "v_prediction")
    step = training(score, OneRank(), steps_per_round=4, learning_rate=2e-2)
    for number in range(10):
        step.round(union_of(4), number)
    lags = [step.lag(union_of(4, lane=20), number) for number in range(10, 20)]
    assert sum(lag > 0 for lag in lags if lag is not None) >= 8


def test_the_lag_looks_at_a_bounded_number_of_samples(unet, make_score, monkeypatch) -> None:
    score = make_score(unet)
    step = training(score, OneRank())
    union = union_of(8, size=2)
    many = Samples.cat([union] * (LAG_SAMPLES // 8 + 3))
    step.replay.push(many, 0)
    sizes: list[int] = []
    loss = score.loss
    monkeypatch.setattr(score, "loss", lambda samples, *rest: sizes.append(len(samples)) or loss(samples, *rest))
    step.lag(many, 1)
    assert sizes == [LAG_SAMPLES, LAG_SAMPLES]


def test_the_views_of_a_particle_stay_together_in_every_batch(unet, make_score, monkeypatch) -> None:
    """A multi-view network needs them in one call, so batches, replay and the shares of ranks never separate them."""
    score = make_score(unet)
    calls = seen_by(score, monkeypatch)
    union = union_of(12, size=2)
    union = dataclasses.replace(union, ids=torch.arange(4).repeat_interleave(3))
    options: dict[str, Any] = {"steps_per_round": 2, "batch_size": 7, "replay_share": 0.5}
    step = training(score, OneRank(), lambda n: slice(0, n - 1), num_views=3, **options)
    for number in range(3):
        step.round(union, number)
    assert len(calls) == 6
    for samples, *_ in calls:
        rows = samples.latents.reshape(-1, 3, *samples.latents.shape[1:])
        whole = union.latents.reshape(4, 3, *union.latents.shape[1:])
        assert all(any(torch.equal(found, particle) for particle in whole) for found in rows)
    # Two particles of three views fit into a batch of seven rows; two more are replayed; the rank omits one.
    assert [len(samples) for samples, *_ in calls[2:]] == [9] * 4


def test_the_draws_of_a_render_do_not_depend_on_what_else_is_in_the_batch(unet, make_score, monkeypatch) -> None:
    """They are keyed by particle and view, so a part of the union gives the same draws."""
    score, union = make_score(unet), union_of(6, size=2)
    calls = seen_by(score, monkeypatch)
    training(score, OneRank()).round(union, 4)
    training(score, OneRank()).round(union[torch.tensor([1, 4])], 4)
    for whole, part in zip(calls[0][1:], calls[1][1:], strict=True):
        assert torch.equal(whole[[1, 4]], part)
