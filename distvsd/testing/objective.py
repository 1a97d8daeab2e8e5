"""What an objective must fulfil: run `check_objective` on yours in your own tests."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor

from distvsd.testing.rules import require, subject
from distvsd.vsd.objectives import Draws, Objective, Part, Predictions
from distvsd.vsd.objectives.base import PriorPart, ScorePart
from distvsd.vsd.process import Diffusion, Flow, Process, add_noise
from distvsd.vsd.rng import Purpose, normal
from distvsd.vsd.samples import Samples

VIEWS = 2
PARTS = (*get_args(PriorPart), *get_args(ScorePart))
PROCESSES: tuple[tuple[Process, Tensor], ...] = (
    (Diffusion(torch.linspace(0.99, 0.01, 100), "epsilon"), torch.tensor([3, 20, 41, 60, 77, 95])),
    (Flow(), torch.tensor([0.1, 0.3, 0.45, 0.6, 0.8, 0.95])),
)


def check_objective(objective: Objective) -> None:
    """Raises AssertionError with one paragraph for the first rule that is broken, in diffusion and in flow.

    Needs no network, no ranks and does not communicate.
    """
    with subject(f"this {type(objective).__name__} cannot be used here"):
        unknown = sorted(set(objective.needs) - set(PARTS))
        require(not unknown, f"needs names {unknown}; known are {', '.join(PARTS)}")
        for process, times in PROCESSES:
            _check(objective, process, times)


def _check(objective: Objective, process: Process, times: Tensor) -> None:
    draws = _draws(process, times)
    given = {part: _random(10 + number) for number, part in enumerate(PARTS) if part in objective.needs}
    asked = {part: value.clone() for part, value in given.items()}
    gradient = objective.gradient(Predictions(**given), draws)
    require(
        gradient.shape == draws.noisy.shape and gradient.dtype == torch.float32,
        f"the gradient is {list(gradient.shape)} {gradient.dtype}; it must be {list(draws.noisy.shape)} torch.float32",
    )
    require(bool(gradient.isfinite().all()), "the gradient of finite predictions is not finite")
    require(not gradient.requires_grad, "the gradient carries a graph; nothing may be differentiated through it")
    require(
        all(torch.equal(given[part], asked[part]) for part in given),
        "the predictions were changed in place; other readers of them see other numbers",
    )
    again = objective.gradient(Predictions(**asked), draws)
    require(torch.equal(gradient, again), "the same call gives another gradient; it may keep no state and draw nothing")
    for part in given:
        other = objective.gradient(Predictions(**given | {part: _random(90)}), draws)
        require(
            not torch.equal(gradient, other),
            f"needs names {part!r}, but the gradient does not depend on it; a network is called for nothing",
        )
    _check_rows(objective, given, draws, gradient)


def _check_rows(objective: Objective, given: dict[Part, Tensor], draws: Draws, gradient: Tensor) -> None:
    """A particle's gradient must not depend on which others are on its rank."""
    rows = slice(VIEWS, 2 * VIEWS)
    alone = objective.gradient(
        Predictions(**{part: value[rows] for part, value in given.items()}),
        replace(
            draws,
            samples=draws.samples[rows],
            times=draws.times[rows],
            noise=draws.noise[rows],
            noisy=draws.noisy[rows],
        ),
    )
    require(
        torch.allclose(alone, gradient[rows], rtol=1e-5, atol=1e-6),
        "a particle's gradient depends on which other particles are in the call, and so on the number of ranks",
    )


def _draws(process: Process, times: Tensor) -> Draws:
    clean, noise = _random(1), _random(2)
    ids = torch.arange(len(times) // VIEWS).repeat_interleave(VIEWS)
    cameras = normal(0, Purpose.SAMPLE, [0], 0, (len(times), 16), 3)[0]
    samples = Samples(clean, cameras, ids, torch.zeros_like(ids), torch.ones(len(times)))
    return Draws(samples, times, noise, add_noise(process, clean, noise, times), process, VIEWS)


def _random(lane: int) -> Tensor:
    return normal(0, Purpose.SAMPLE, [0], 0, (6, 4, 3, 3), lane)[0]
