"""The tensors that a checkpoint must hold of a particle are known without making one."""

import dataclasses
from pathlib import Path

import pytest
import torch

from distvsd.config import load_config
from distvsd.errors import CheckpointError
from distvsd.particles.stored import blank_state, read_particle
from distvsd.run.parts import make_particle
from tests.unit.particles.shards import image, shard

IMAGES = image(init_color=0.2)
LATENTS = dataclasses.replace(
    image((4, 2, 2), init_color=0.2), encode=lambda colors: colors.mean(1, keepdim=True).expand(-1, 4, 2, 2)
)
SMOKE = Path(__file__).parents[3] / "configs" / "smoke.yaml"


def nerf(**changes):
    config = load_config(SMOKE, [f"particles.nerf.{key}={value}" for key, value in changes.items()])
    return make_particle(config, None, torch.device("cpu"))


def state_of(particle):
    return {name: value.clone() for name, value in shard(particle, [3]).state()[3].items()}


def layout(tensors):
    return {name: (value.dtype, value.shape) for name, value in tensors.items()}


@pytest.mark.parametrize("particle", [IMAGES, LATENTS, nerf(background="learned"), nerf(background="none")])
def test_a_blank_state_has_the_names_dtypes_and_shapes_of_a_particle_that_is_there(particle):
    assert layout(blank_state(particle)) == layout(state_of(particle))


def test_a_blank_state_takes_no_memory_however_large_the_particle():
    # 32 levels of 2^28 entries of 16 numbers: 550 GB of parameters.
    huge = nerf(levels=32, features=16, log2_table_size=28, base_resolution=4096, max_resolution=65536)
    state = blank_state(huge)
    assert state["param/grid31"].shape == (16, 2**28)
    assert sum(value.untyped_storage().nbytes() for value in state.values()) < 10_000


def test_parameters_may_have_any_value_and_moments_may_not():
    like = blank_state(IMAGES)
    saved = state_of(IMAGES)
    saved["param/image"].fill_(torch.nan)
    health, place, beside = read_particle(3, like, saved, {"bad": 2, "total": 4, "good": "initial"}, rounds=9)
    assert (health.bad, health.total, place, beside) == (2, 4, "initial", {})
    for name, value in (("adam_m/image", torch.inf), ("adam_v/image", -1.0), ("adam_step", 10)):
        wrong = {key: tensor.clone() for key, tensor in saved.items()}
        wrong[name].fill_(value)
        with pytest.raises(CheckpointError, match=f"particle 3: {name} has values"):
            read_particle(3, like, wrong, {}, rounds=9)


def test_a_good_state_beside_the_present_one_is_held_against_the_same():
    saved = state_of(IMAGES)
    both = saved | {f"good/{name}": value.clone() for name, value in saved.items()}
    assert set(read_particle(3, saved, both, {"good": "beside"})[2]) == set(saved)
    both["good/adam_v/image"] = both["good/adam_v/image"] - 1
    with pytest.raises(CheckpointError, match="good/adam_v/image has values"):
        read_particle(3, saved, both, {"good": "beside"})
    # A good state that is not read is not checked.
    assert read_particle(3, saved, both, {"good": "initial"})[1] == "initial"
