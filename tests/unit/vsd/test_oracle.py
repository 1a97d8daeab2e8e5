"""VSD against an exactly known target, at a small size; `benchmarks/oracle.md` has the figures at full size."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from benchmarks.mixture import cosine_alphas_cumprod, measure, noise_floor, ring, sliced_wasserstein
from benchmarks.oracle import EmpiricalScore, Settings, distil

COUNT = 256
LEVELS = torch.tensor([0.9995, 0.9, 0.5, 0.01], dtype=torch.float64)


def noised(weights, means, stds, abar):
    """The mixture after noising, as torch.distributions writes it."""
    variances = abar * stds**2 + 1 - abar
    covariances = variances[:, None, None] * torch.eye(2, dtype=torch.float64)
    return MixtureSameFamily(Categorical(weights), MultivariateNormal(abar.sqrt() * means, covariances))


def noise_by_autograd(density, points, abar):
    points = points.clone().requires_grad_()
    [score] = torch.autograd.grad(density.log_prob(points).sum(), points)
    return -(1 - abar).sqrt() * score


def scattered(count=40):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.fixture(scope="module")
def mixture():
    narrow = ring()
    return type(narrow)(narrow.weights.double(), narrow.means.double(), narrow.stds.double())


@pytest.mark.parametrize("abar", LEVELS)
def test_the_mixtures_noise_is_the_gradient_of_its_log_density_at_every_level(mixture, abar):
    points, level = scattered(), abar.expand(40)
    density = noised(mixture.weights, mixture.means, mixture.stds, abar)
    torch.testing.assert_close(mixture.log_density(points, level), density.log_prob(points))
    torch.testing.assert_close(mixture.eps(points, level), noise_by_autograd(density, points, abar))


@pytest.mark.parametrize("abar", LEVELS)
def test_the_mixtures_velocity_is_its_noise_in_other_words(mixture, abar):
    points, level = scattered(), abar.expand(40)
    eps = mixture.eps(points, level)
    clean = (points - (1 - abar).sqrt() * eps) / abar.sqrt()
    torch.testing.assert_close(mixture.velocity(points, level), abar.sqrt() * eps - (1 - abar).sqrt() * clean)


def test_the_particles_own_score_is_that_of_a_kernel_on_each_of_them_itself_included():
    particles, timesteps = scattered(7), torch.tensor([20, 300, 980])
    abars = cosine_alphas_cumprod().double()
    noisy = scattered(3)
    found = EmpiricalScore(lambda: particles, abars, chunk=2).eps(noisy.reshape(3, 2, 1, 1), timesteps, None, None)
    for row, t in enumerate(timesteps.tolist()):
        density = noised(torch.full((7,), 1 / 7), particles, torch.zeros(7, dtype=torch.float64), abars[t])
        expected = noise_by_autograd(density, noisy[row : row + 1], abars[t])
        torch.testing.assert_close(found[row].flatten(), expected[0], rtol=1e-6, atol=1e-8)


def test_sliced_wasserstein_of_a_split_pair_is_two_over_pi():
    apart, together = torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # On an axis at angle a both points are |cos a| away; the mean of |cos| is 2 / pi.
    assert sliced_wasserstein(apart, together) == pytest.approx(2 / math.pi, rel=1e-3)
    assert sliced_wasserstein(apart, apart.flip(0)) == 0


def test_the_measures_of_true_samples_are_those_of_the_target():
    found = measure(ring().sample(20_000, 5), ring(), draws=1)
    assert found["mode_total_variation"] < 0.02
    assert all(0.9 < spread < 1.1 for spread in found["spread"])


@pytest.fixture(scope="module")
def floor():
    return noise_floor(COUNT, ring())


def small(arm, **settings):
    return measure(distil(ring(), Settings(arm, particles=COUNT, **settings)), ring())


def test_vsd_with_the_exact_score_gives_samples_of_the_target(floor):
    found = small("vsd-exact", rounds=250, learning_rate=0.06)
    assert found["sliced_wasserstein"] < floor["sliced_wasserstein"]  # nearer than independent true samples
    assert found["mode_total_variation"] < floor["mode_total_variation"]
    assert 0.9 < found["spread_median"] < 1.2


def test_vsd_with_a_fitted_score_comes_as_near_as_true_samples(floor):
    found = small("vsd-network", rounds=120, learning_rate=0.06, score_steps=2, score_learning_rate=5e-3)
    assert found["sliced_wasserstein"] < floor["sliced_wasserstein_max"]
    assert found["mode_total_variation"] < floor["mode_total_variation_max"]


def test_sds_collapses_within_modes_and_misses_their_weights(floor):
    found = small("sds", rounds=350, learning_rate=0.12)
    assert found["spread_median"] < 0.5
    assert found["sliced_wasserstein"] > floor["sliced_wasserstein_max"]
    assert found["mode_total_variation"] > 1.3 * floor["mode_total_variation"]
