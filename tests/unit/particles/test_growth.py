"""Relocation and noise of gaussians against the formulas of arXiv 2404.09591."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distvsd.particles.growth import corrected, drawn, exploration, relocated


def binomials(opacity, copies):
    """Eq. 9 of the paper as it stands there: the new opacity, and the factor on the standard deviations."""
    new = 1 - (1 - opacity) ** (1 / copies)
    total = 0.0
    for i in range(1, copies + 1):
        for k in range(i):
            total += math.comb(i - 1, k) * (-1) ** k * new ** (k + 1) / math.sqrt(k + 1)
    return new, opacity / total


@given(opacity=st.floats(0.005, 0.99), copies=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_the_correction_is_equation_9(opacity, copies):
    new, shrunk = corrected(torch.tensor([opacity], dtype=torch.float64), torch.tensor([copies]))
    assert (float(new), float(shrunk)) == pytest.approx(binomials(opacity, copies), rel=1e-9)


def test_one_alone_is_not_corrected_and_very_many_still_are():
    opacities = torch.tensor([0.3, 0.3])
    new, shrunk = corrected(opacities, torch.tensor([1, 10**5]))
    assert float(new[0]) == pytest.approx(0.3) and float(shrunk[0]) == pytest.approx(1)
    # -log(0.7) / 10^5; and a limit, because many faint ones act as one cloud.
    assert float(new[1]) == pytest.approx(3.5667e-6, rel=1e-3) and 0.9 < float(shrunk[1]) < 1


def test_entries_are_drawn_in_proportion_to_their_weights():
    weights = torch.tensor([[0.0, 0.1, 0.3, 0.6, 0.0], [1.0, 0.0, 0.0, 0.0, 1.0]])
    draws = ((torch.arange(10000) + 0.5) / 10000).expand(2, -1)
    counts = torch.stack([torch.bincount(row, minlength=5) for row in drawn(weights, draws)])
    torch.testing.assert_close(counts / 10000, weights / weights.sum(1, keepdim=True), rtol=0, atol=1e-3)
    assert not counts[weights == 0].any()


def test_a_row_without_weight_gives_something_and_its_neighbour_does_not_notice():
    alone = drawn(torch.tensor([[0.2, 0.8]]), torch.tensor([[0.1, 0.9]]))
    both = drawn(torch.tensor([[0.0, 0.0], [0.2, 0.8]]), torch.tensor([[0.1, 0.9], [0.1, 0.9]]))
    assert torch.equal(both[1:], alone) and bool((both[0] < 2).all())


def test_only_the_dead_move_and_only_to_the_living():
    generator = torch.Generator().manual_seed(0)
    opacities = torch.rand(3, 200, generator=generator) ** 3
    opacities[:, ::7] = 0.001
    found = relocated(opacities, 0.005, torch.rand(3, 200, generator=generator))
    dead, itself = opacities < 0.005, torch.arange(200).expand(3, -1)
    assert torch.equal(found.source[~dead], itself[~dead])
    assert not dead.gather(1, found.source).any()
    received = torch.zeros(3, 200, dtype=torch.bool)
    for row in range(3):
        received[row, found.source[row][dead[row]]] = True
    assert torch.equal(found.changed, dead | received)
    assert torch.equal(found.opacities[~found.changed], opacities[~found.changed])
    assert bool((found.shrunk[~found.changed] == 1).all()) and bool((found.opacities >= 0.005).all())


def test_those_that_share_a_place_have_the_same_corrected_values():
    opacities = torch.tensor([[0.8, 0.001, 0.002, 0.0]])
    found = relocated(opacities, 0.005, torch.tensor([[0.5, 0.1, 0.2, 0.9]]))
    new, shrunk = binomials(0.8, 4)
    assert found.source.tolist() == [[0, 0, 0, 0]] and bool(found.changed.all())
    torch.testing.assert_close(found.opacities, torch.full((1, 4), new))
    torch.testing.assert_close(found.shrunk, torch.full((1, 4), shrunk))


@pytest.mark.parametrize("opacities", [[0.5, 0.9], [0.001, 0.002], [math.nan, 0.5]])
def test_where_none_is_dead_or_none_alive_nothing_moves(opacities):
    found = relocated(torch.tensor([opacities]), 0.005, torch.tensor([[0.3, 0.3]]))
    assert found.source.tolist() == [[0, 1]] and not found.changed.any()


def test_the_noise_is_the_covariance_times_normal_numbers_and_only_the_faint_have_it():
    axes = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))[0] * torch.tensor(
        [0.1, 0.2, 0.4]
    )
    normals = torch.tensor([0.3, -1.0, 2.0])
    opacities = torch.tensor([[0.0, 0.005, 0.1, 0.5]])
    found = exploration(opacities, 0.005, axes.expand(1, 4, 3, 3), normals.expand(1, 4, 3))[0]
    whole = axes @ axes.T @ normals
    # sigmoid(-100 (o - 0.005)): 0.62246, 0.5, 7.5e-5, 3e-22
    expected = torch.outer(torch.tensor([0.622459, 0.5, 7.4846e-05, 0.0]), whole)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-9)
