"""What a checkpoint must hold of a particle for a resume: one definition, for reading it and for verifying it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distvsd.particles.base import Particle
from distvsd.particles.good import Place, saved_place
from distvsd.particles.group import Group, without_frozen
from distvsd.particles.health import Health
from distvsd.vsd.wanted import MOST, Wanted, refuse_misfits

# The prefix of a particle's last good state in its file, where that is neither the present nor the initial one. Frozen
# parameters are not repeated.
GOOD = "good/"


def blank_state(particle: Particle) -> dict[str, Tensor]:
    """What `Group.state_of` gives of one particle, without values and without memory: names, dtypes and shapes."""
    nobody = torch.zeros(0, dtype=torch.int64)
    parameters = particle.init(0, nobody)
    group = Group.of(particle, [], nobody, parameters, betas=(0.0, 0.0), eps=1.0)
    return {name: value.new_empty(()).expand(value.shape[1:]) for name, value in group.state_of(slice(None)).items()}


def read_particle(
    particle_id: int,
    like: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    record: Mapping[str, Any] | None,
    rounds: int = MOST,
) -> tuple[Health, Place, dict[str, Tensor]]:
    """The health of a particle, where its last good state is, and that state where the file holds it; copies nothing.

    like: tensors of the names, dtypes and shapes of `Group.state_of`, on any device. record: of the manifest. rounds:
    completed when it was saved. Raises CheckpointError for what a particle cannot be; a resume may then change nothing.
    Parameters may have any value: a particle that diverged is saved as it is, and is put back later. Its moments are
    finite, because no gradient that is not ever reaches them.
    """
    health = Health.from_json(record, rounds)
    good = {name.removeprefix(GOOD): value for name, value in tensors.items() if name.startswith(GOOD)}
    place = saved_place(record, bool(good))
    wanted = {name: _wanted(name, value, rounds) for name, value in like.items()}
    if place == "beside":
        wanted |= {GOOD + name: wanted[name] for name in without_frozen(like)}
    advice = (
        "resume with the particles' configuration of that run, or delete this checkpoint to go on from an older one"
    )
    refuse_misfits(f"particle {particle_id}", wanted, tensors, advice)
    return health, place, good


def _wanted(name: str, like: Tensor, rounds: int) -> Wanted:
    dtype, shape = like.dtype, tuple(like.shape)
    match name.partition("/")[0]:
        case "adam_m":
            return Wanted(dtype, shape, finite=True)
        case "adam_v":
            return Wanted(dtype, shape, low=0)
        case "adam_step":
            return Wanted(dtype, shape, 0, rounds)
    return Wanted(dtype, shape)
