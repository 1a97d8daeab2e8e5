"""Rules of how particles begin: their initial values, what is handed over, what of them is trained, what they cost."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch

from distvsd.config import ImageConfig
from distvsd.errors import ConfigError
from distvsd.particles.base import Handed, Parameters
from distvsd.particles.image import ImageParticle
from distvsd.testing.rules import equal, require, row_of
from distvsd.testing.trial import Trial


class Unknown(ImageParticle):
    """A kind of particle that no other kind can begin from."""


def init(trial: Trial) -> None:
    parameters, again = trial.init(), trial.init()
    count = len(trial.ids)
    require(bool(parameters), "init returns no parameters; there is nothing to optimise")
    for name, value in parameters.items():
        require(
            value.dtype == torch.float32 and value.device == trial.ids.device,
            f"init: {name} is {value.dtype} on {value.device}; it must be float32 on the device of the ids "
            f"({trial.ids.device})",
        )
        require(
            value.ndim >= 1 and value.shape[0] == count,
            f"init: {name} is {list(value.shape)}; its first axis must be that of the {count} particles",
        )
        require(bool(value.isfinite().all()), f"init: {name} is not finite")
    require(
        equal(parameters, again),
        "init gives other values when it is called again; draw from distvsd.vsd.rng with the seed and the ids, so "
        "that a run can be repeated",
    )
    _init_is_keyed(trial, parameters)
    none = trial.particle.init(trial.seed, trial.ids[:0])
    require(
        {name: value.shape for name, value in none.items()}
        == {name: value[:0].shape for name, value in parameters.items()},
        "init for no ids has other names or shapes than for some, the number of particles apart; checkpoints are "
        "checked against them",
    )


def _init_is_keyed(trial: Trial, parameters: Parameters) -> None:
    if trial.source is None:
        other_seed = trial.init(seed=trial.seed + 1)
        require(not equal(parameters, other_seed), "init ignores its seed; two runs would start alike")
    for row, particle_id in enumerate(trial.ids.tolist()):
        for other in range(row):
            require(
                not equal(row_of(parameters, row), row_of(parameters, other)),
                f"init: particles {particle_id} and {int(trial.ids[other])} start alike; key the streams by the ids, "
                "or all particles stay in one mode",
            )
        alone = trial.init(slice(row, row + 1))
        require(
            equal(row_of(alone, 0), row_of(parameters, row)),
            f"init: particle {particle_id} starts differently when it is made alone; its values may depend on its id "
            "and its row of the source only, because another number of ranks groups the particles differently",
        )


def hand_over(trial: Trial) -> None:
    one = {"image": torch.zeros(len(trial.ids), 1, 1, 1, device=trial.ids.device)}
    kind = Unknown(config=ImageConfig(space="latent"), shape=(1, 1, 1), learning_rate=lambda step: 0.0)
    try:
        trial.particle.init(trial.seed, trial.ids, Handed(kind, one))
    except ConfigError:
        pass
    else:
        require(False, "init accepts a source of a kind that it cannot know; raise ConfigError, as Handed.refuse does")
    if trial.source is None:
        return
    before = {name: value.clone() for name, value in trial.source.parameters.items()}
    made = trial.init()
    require(equal(before, trial.source.parameters), "init changes the parameters that are handed over")
    theirs = {value.untyped_storage().data_ptr() for value in trial.source.parameters.values() if value.numel()}
    shared = [name for name, value in made.items() if value.untyped_storage().data_ptr() in theirs]
    require(not shared, f"init: {', '.join(shared)} shares memory with the source, which updates would change; copy it")
    other = {name: value.flip(0) for name, value in trial.source.parameters.items()}
    flipped = trial.particle.init(trial.seed, trial.ids, Handed(trial.source.particle, other))
    require(not equal(made, flipped), "init ignores its source; nothing is handed over")


def learning_rates(trial: Trial, frozen: Collection[str]) -> None:
    names, named = set(trial.init()), set(trial.particle.learning_rates(0))
    require(bool(named), "learning_rates(0) is empty; there is nothing to optimise")
    for step in (0, 10**6):
        rates = trial.particle.learning_rates(step)
        unknown, without = sorted(rates.keys() - names), sorted(names - rates.keys() - set(frozen))
        require(not unknown, f"learning_rates({step}) has one for {', '.join(unknown)}, which init does not make")
        require(
            not without,
            f"learning_rates({step}) has none for {', '.join(without)}; name in frozen what is never trained",
        )
        require(rates.keys() == named, f"learning_rates({step}) names other parameters than at round 0")
        wrong = [name for name, rate in rates.items() if not (math.isfinite(rate) and rate >= 0)]
        require(not wrong, f"learning_rates({step}): {', '.join(wrong)} is not a finite number of at least 0")
    trained = sorted(set(frozen) & named)
    require(not trained, f"{', '.join(trained)} has a learning rate, but is named in frozen")


def cost(trial: Trial) -> None:
    found, trained = trial.particle.cost(trial.resolution), set(trial.trained())
    sizes = {name: value[0].numel() for name, value in trial.init().items()}
    counted = sum(size for name, size in sizes.items() if name in trained)
    require(found.trained == counted, f"cost says {found.trained} trained numbers a particle; init makes {counted}")
    counted = sum(sizes.values()) - counted
    require(found.frozen == counted, f"cost says {found.frozen} frozen numbers a particle; init makes {counted}")
    require(found.points >= 1, f"cost says that a view is evaluated at {found.points} points; it must be at least 1")
