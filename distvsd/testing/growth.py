"""Rules of particles whose structure changes while they are trained: see `particles.base.Adaptive`."""

from __future__ import annotations

import math

import torch

from distvsd.particles.base import Adapted, Adaptive, Parameters
from distvsd.testing.rules import close, equal, require
from distvsd.testing.trial import Trial

ROUNDS = (0, 1, 9, 49, 99, 199)  # rounds that are tried: structure may change in some rounds only


def adapts(trial: Trial) -> None:
    """Nothing for a kind without the ability."""
    if not isinstance(trial.particle, Adaptive):
        return
    for step in ROUNDS:
        parameters = trial.init()
        adapted = _adapted(trial, parameters, step)
        if adapted is None:
            continue
        require(equal(parameters, trial.init()), f"adapt changes the parameters it is given (round {step})")
        _check_shapes(trial, parameters, adapted, step)
        again = _adapted(trial, parameters, step)
        require(
            again is not None and equal(again.parameters, adapted.parameters),
            f"adapt gives other values when it is called again with the same keys (round {step}); draw from "
            "distvsd.vsd.rng keyed by seed, id and step, or a resumed run would go on differently",
        )
        _rows_are_independent(trial, parameters, adapted, step)


def _adapted(trial: Trial, parameters: Parameters, step: int, rows: slice = slice(None)) -> Adapted | None:
    assert isinstance(trial.particle, Adaptive), "the caller has looked"
    mine = {name: value[rows] for name, value in parameters.items()}
    return trial.particle.adapt(mine, trial.keys(step, rows), torch.ones(len(trial.ids[rows]), device=trial.ids.device))


def _check_shapes(trial: Trial, parameters: Parameters, adapted: Adapted, step: int) -> None:
    unknown = sorted(adapted.parameters.keys() - parameters.keys())
    require(not unknown, f"adapt (round {step}) names {', '.join(unknown)}, which init does not make")
    unknown = sorted(adapted.restarted.keys() - set(trial.trained()))
    require(not unknown, f"adapt (round {step}) restarts {', '.join(unknown)}, which are no trained parameters")
    for name, value in adapted.parameters.items():
        require(
            value.shape == parameters[name].shape and value.dtype == torch.float32,
            f"adapt (round {step}): {name} is {value.dtype} {list(value.shape)}; it must stay float32 "
            f"{list(parameters[name].shape)}, because a checkpoint's shapes never change",
        )
        require(bool(value.isfinite().all()), f"adapt (round {step}): {name} is not finite")
    for name, mask in adapted.restarted.items():
        shape = parameters[name].shape
        fits = mask.ndim == len(shape) and all(
            size in (1, whole) for size, whole in zip(mask.shape, shape, strict=True)
        )
        require(
            mask.dtype == torch.bool and fits and len(mask) == len(trial.ids),
            f"adapt (round {step}): the mask of {name} is {mask.dtype} {list(mask.shape)}; it must be bool and "
            f"broadcast to {list(shape)}",
        )


def _rows_are_independent(trial: Trial, parameters: Parameters, adapted: Adapted, step: int) -> None:
    for row, particle_id in enumerate(trial.ids.tolist()):
        alone = _adapted(trial, parameters, step, slice(row, row + 1))
        require(
            alone is not None
            and all(close(value[0], adapted.parameters[name][row]) for name, value in alone.parameters.items()),
            f"adapt (round {step}): particle {particle_id} depends on which particles are in the same call",
        )
        lost = {name: value.clone() for name, value in parameters.items()}
        for value in lost.values():
            value[row] = math.nan
        rest, others = _adapted(trial, lost, step), [other for other in range(len(trial.ids)) if other != row]
        require(
            rest is not None
            and all(close(value[others], adapted.parameters[name][others]) for name, value in rest.parameters.items()),
            f"adapt (round {step}): a NaN in particle {particle_id} reaches other particles",
        )
