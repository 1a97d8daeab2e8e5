"""The distillation gradients, against a computation in float64 written out here."""

import math

import pytest
import torch

from distvsd.faults import injected
from distvsd.vsd.objectives import ESD, SDS, VSD, Distillation, Predictions
from distvsd.vsd.process import Diffusion
from distvsd.vsd.rng import Purpose, normal, uniform
from distvsd.vsd.samples import Samples

SEED, STEP, VIEWS = 11, 5, 2
ABAR = torch.linspace(0.999, 0.001, 50)


def samples(num_particles=3):
    generator = torch.Generator().manual_seed(1)
    rows = num_particles * VIEWS
    return Samples(
        latents=torch.randn(rows, 4, 3, 3, generator=generator),
        cameras=torch.randn(rows, 16, generator=generator),
        ids=torch.arange(num_particles).repeat_interleave(VIEWS) + 20,
        views=torch.arange(rows) % 4,
        weight=torch.ones(rows),
    )


def prior_eps(noisy, times, views):
    return torch.sin(noisy) + times.reshape(-1, 1, 1, 1) * 0.01 + views.reshape(-1, 1, 1, 1)


def prior(noisy, times, samples, parts):
    return Predictions(**dict.fromkeys(parts, prior_eps(noisy, times, samples.views)))


def score_eps(noisy, times, ids, cameras):
    shift = 0.0 if cameras is None else cameras.sum(1).reshape(-1, 1, 1, 1)
    return torch.cos(noisy) + shift


OBJECTIVES = {"vsd": lambda esd_lambda: VSD(), "sds": lambda esd_lambda: SDS(), "esd": ESD}


def distillation(kind, esd_lambda=0.5, **changes):
    parts = {
        "objective": OBJECTIVES[kind](esd_lambda),
        "process": Diffusion(ABAR, "epsilon"),
        "prior": prior,
        "score": score_eps,
        "seed": SEED,
        "num_views": VIEWS,
        "t_min": lambda step: 0.02,
        "t_max": lambda step: 0.98,
    }
    return Distillation(**parts | changes)


def by_hand(kind, batch, esd_lambda=0.5):
    """Row by row in float64, with Python's own square roots; only the random numbers are shared."""
    rows = []
    particles = batch.ids[::VIEWS]
    u = uniform(SEED, Purpose.TIMESTEP, particles, STEP, (VIEWS,)).flatten()
    noise = normal(SEED, Purpose.NOISE, particles, STEP, (VIEWS, 4, 3, 3)).flatten(0, 1).double()
    for row in range(len(batch)):
        low, high = round(0.02 * 49), round(0.98 * 49)
        t = min(low + int(u[row].double().item() * (high - low + 1)), high)
        abar = float(ABAR[t].double())
        x0, eps = batch.latents[row].double(), noise[row]
        noisy = math.sqrt(abar) * x0 + math.sqrt(1 - abar) * eps
        teacher = torch.sin(noisy) + t * 0.01 + float(batch.views[row])
        camera = float(batch.cameras[row].double().sum())
        other = {
            "sds": eps,
            "vsd": torch.cos(noisy) + camera,
            "esd": (1 - esd_lambda) * (torch.cos(noisy) + camera) + esd_lambda * torch.cos(noisy),
        }[kind]
        rows.append((1 - abar) * (teacher - other) / VIEWS)
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["vsd", "sds", "esd"])
def test_gradient_equals_the_formula_in_float64(kind):
    batch = samples()
    gradient = distillation(kind, esd_lambda=0.3)(batch, STEP).double()
    expected = by_hand(kind, batch, esd_lambda=0.3)
    assert (gradient - expected).abs().max() / expected.abs().max() < 1e-6


@pytest.mark.parametrize(("esd_lambda", "has_camera"), [(0.0, True), (1.0, False)])
def test_esd_asks_the_score_once_where_the_other_answer_would_count_for_nothing(esd_lambda, has_camera):
    asked, batch = [], samples()

    def score(noisy, times, ids, cameras):
        asked.append(cameras is not None)
        return score_eps(noisy, times, ids, cameras)

    found = distillation("esd", esd_lambda=esd_lambda, score=score)(batch, STEP)
    assert asked == [has_camera]
    expected = by_hand("esd", batch, esd_lambda)
    assert (found.double() - expected).abs().max() / expected.abs().max() < 1e-6


def test_sds_asks_no_score_network():
    assert torch.equal(distillation("sds", score=None)(samples(), STEP), distillation("sds")(samples(), STEP))


def test_vsd_is_zero_where_the_score_is_the_prior():
    same = distillation("vsd", prior=lambda n, t, s, parts: Predictions(guided=n * 2), score=lambda n, t, i, c: n * 2)
    assert same(samples(), STEP).abs().max() == 0


@pytest.mark.parametrize("kind", ["vsd", "sds", "esd"])
def test_the_prior_is_asked_once_and_for_what_the_objective_needs(kind):
    asked = []
    ask = distillation(kind, prior=lambda n, t, s, parts: asked.append(parts) or prior(n, t, s, parts))
    ask(samples(), STEP)
    assert asked == [frozenset({"guided"})]


def test_a_prediction_that_is_read_but_not_named_as_needed_is_an_error():
    class Careless(VSD):
        needs = frozenset({"guided"})

    with pytest.raises(ValueError, match="'score'"):
        distillation("vsd", objective=Careless())(samples(), STEP)


def test_a_masked_sample_has_no_gradient_and_its_nan_reaches_nobody():
    batch, clean = samples(), samples()
    batch.latents[3] = math.nan
    batch.weight[3] = 0
    gradient, expected = distillation("vsd")(batch, STEP), distillation("vsd")(clean, STEP)
    assert gradient[3].abs().max() == 0
    keep = [0, 1, 2, 4, 5]
    assert torch.equal(gradient[keep], expected[keep])


def test_a_particles_draws_do_not_depend_on_its_neighbours():
    everyone = samples()
    alone = everyone[slice(2, 4)]
    torch.testing.assert_close(
        distillation("sds")(everyone, STEP)[2:4], distillation("sds")(alone, STEP), rtol=0, atol=0
    )


def test_no_samples_give_no_gradient_and_call_no_network():
    nobody = samples()[slice(0, 0)]
    silent = distillation("vsd", prior=None, score=None)
    assert silent(nobody, STEP).shape == (0, 4, 3, 3)


@pytest.mark.parametrize("kind", ["sds", "vsd", "esd"])
def test_an_answer_that_is_not_finite_stays_in_the_rows_of_its_particle(kind):
    batch = samples()
    clean = distillation(kind)(batch, STEP)
    with injected("nan@score:particle=21"):
        struck = distillation(kind)(batch, STEP)
    of_particle = batch.ids == 21
    assert struck[of_particle].isnan().all() and torch.equal(struck[~of_particle], clean[~of_particle])


def test_a_masked_particle_does_not_even_pass_on_an_answer_that_is_not_finite():
    batch = samples()
    batch.weight[batch.ids == 21] = 0
    with injected("nan@score:particle=21"):
        gradient = distillation("vsd")(batch, STEP)
    assert torch.equal(gradient[batch.ids == 21], torch.zeros(VIEWS, 4, 3, 3)) and gradient.isfinite().all()
