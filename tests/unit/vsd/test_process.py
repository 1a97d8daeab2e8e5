"""The forward processes, and the conversions between what networks predict."""

import pytest
import torch

from distvsd.vsd.process import Diffusion, Flow, add_noise

ABAR = torch.tensor([0.99, 0.64, 0.5, 0.1, 0.01], dtype=torch.float64)
DIFFUSIONS = [Diffusion(ABAR, prediction) for prediction in ("epsilon", "v_prediction", "sample")]
CASES = [(process, torch.arange(5)) for process in DIFFUSIONS]
CASES.append((Flow(), torch.tensor([0.05, 0.3, 0.5, 0.8, 0.99], dtype=torch.float64)))
NAMES = ["epsilon", "v_prediction", "sample", "flow"]


def draw():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2)]


def one(value):
    return torch.full((1, 1, 1, 1), value, dtype=torch.float64)


def test_diffusion_adds_noise_with_alpha_and_sigma():
    # abar = 0.64: alpha = 0.8, sigma = 0.6; 0.8 * 2 + 0.6 * (-1) = 1.0
    assert add_noise(DIFFUSIONS[0], one(2.0), one(-1.0), torch.tensor([1])).item() == pytest.approx(1.0, abs=1e-12)


def test_flow_goes_in_a_straight_line_from_the_sample_to_the_noise():
    # (1 - 0.25) * 2 + 0.25 * (-1) = 1.25, and the velocity is -1 - 2 = -3 everywhere.
    quarter = torch.tensor([0.25], dtype=torch.float64)
    assert add_noise(Flow(), one(2.0), one(-1.0), quarter).item() == pytest.approx(1.25, abs=1e-12)
    assert Flow().target(one(2.0), one(-1.0), quarter).item() == -3.0


def test_velocity_of_diffusion_is_alpha_eps_minus_sigma_x0():
    # 0.8 * (-1) - 0.6 * 2 = -2.0
    assert DIFFUSIONS[1].target(one(2.0), one(-1.0), torch.tensor([1])).item() == pytest.approx(-2.0, abs=1e-12)


@pytest.mark.parametrize(("process", "t"), CASES, ids=NAMES)
def test_a_perfect_network_gives_back_the_noise_and_the_sample(process, t):
    clean, noise = draw()
    noisy = add_noise(process, clean, noise, t)
    output = process.target(clean, noise, t)
    torch.testing.assert_close(process.to_eps(output, noisy, t), noise, rtol=0, atol=1e-12)
    torch.testing.assert_close(process.to_x0(output, noisy, t), clean, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("process", "t"), CASES, ids=NAMES)
def test_guiding_outputs_is_guiding_their_noise(process, t):
    """For a given x_t every kind of output is affine in eps; guidance relies on that."""
    one, other = draw()
    noisy = one + other
    mixed = process.to_eps(one + 3 * (other - one), noisy, t)
    eps = [process.to_eps(output, noisy, t) for output in (one, other)]
    torch.testing.assert_close(mixed, eps[0] + 3 * (eps[1] - eps[0]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("process", "t"), CASES, ids=NAMES)
def test_the_weight_is_the_share_of_the_noise_in_the_variance(process, t):
    alpha, sigma = process.alpha_sigma(t)
    torch.testing.assert_close(process.weight(t), sigma**2 / (alpha**2 + sigma**2), rtol=1e-12, atol=0)


def test_velocity_is_defined_at_both_ends():
    clean, noise = draw()
    diffusion = Diffusion(torch.tensor([0.0, 1.0], dtype=torch.float64), "v_prediction")
    for process, ends in ((diffusion, (0, 1)), (Flow(), (0.0, 1.0))):
        for end in ends:
            t = torch.full((5,), end)
            noisy = add_noise(process, clean, noise, t)
            output = process.target(clean, noise, t)
            torch.testing.assert_close(process.to_eps(output, noisy, t), noise)
            torch.testing.assert_close(process.to_x0(output, noisy, t), clean)


def test_an_unknown_prediction_type_is_named():
    with pytest.raises(ValueError, match="'velocity'"):
        Diffusion(ABAR, "velocity")


def test_times_of_diffusion_fill_their_range_evenly_and_never_leave_it():
    process = Diffusion(torch.linspace(0.99, 0.01, 1000), "epsilon")
    t = process.times((torch.arange(10_000) + 0.5) / 10_000, 0.02, 0.5)
    # 0.02 * 999 = 19.98 and 0.5 * 999 = 499.5, which Python rounds to even.
    assert (t.min().item(), t.max().item()) == (20, 500)
    counts = torch.bincount(t)[20:]
    assert counts.min() >= 20 and counts.max() <= 22  # 10,000 / 481 = 20.8 each
    assert process.times(torch.tensor([0.0, 1 - 2**-24]), 0.0, 1.0).tolist() == [0, 999]


def test_times_of_flow_are_uniform_and_a_shift_moves_them_towards_noise():
    u = (torch.arange(10_000) + 0.5) / 10_000
    t = Flow().times(u, 0.2, 0.6)
    assert t.min() >= 0.2 and t.max() <= 0.6 and t.mean().item() == pytest.approx(0.4, abs=1e-4)
    # shift 3 at one half: 3 * 0.5 / (1 + 2 * 0.5) = 0.75; the ends stay.
    assert Flow(3.0).times(torch.tensor([0.0, 0.5, 1.0]), 0.0, 1.0).tolist() == [0.0, 0.75, 1.0]
