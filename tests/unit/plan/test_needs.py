"""The least memory that a run needs, compared with what its parts take, and the refusal of runs that cannot fit."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distvsd.config import Config, Schedule, load_config
from distvsd.errors import ConfigError
from distvsd.plan.needs import (
    Places,
    least_memory,
    page_bytes,
    particle_bytes,
    places_of,
    refuse_too_large,
    refuse_unpaged,
)
from distvsd.run.parts import blank_particle, make_ensemble
from distvsd.runtime.memory import host_memory
from distvsd.vsd.samples import Samples

ROOT = Path(__file__).parents[3]
SMOKE = ROOT / "configs" / "smoke.yaml"
LATENTS = 48 * 16 * 16
TRAIN = """
import resource, sys
from distvsd.config import load_config
from distvsd.run.train import train
import torch, distvsd.run.build, diffusers, transformers
smoke, folder, *overrides = sys.argv[1:]
for number, override in enumerate(overrides):
    config = load_config(smoke, [f"run.dir={folder}/{number}", override])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        train(config)
    except Exception as error:
        print(type(error).__name__, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, error)
"""
HUGE = (
    "particles.count=2147483647",
    "particles.views=1000000000",
    "particles.nerf={log2_table_size: 28, levels: 32, features: 16, max_resolution: 65536}",
)


def needs_of(config: Config, particles: int) -> dict[str, int]:
    return least_memory(config, blank_particle(config, (48, 16, 16)), LATENTS, particles)


def test_no_more_is_asked_for_than_a_rank_really_takes() -> None:
    config = load_config(SMOKE, ["particles.views=3", "particles.nerf.log2_table_size=10", "particles.micro_batch=0"])
    needs = needs_of(config, 4)
    ensemble = make_ensemble(config, None, range(4), "cpu")
    values = sum(tensor.nbytes for i in ensemble.ids for tensor in ensemble.parameters_of(i).values())
    assert needs["particles"] == 4 * values
    (views,) = ensemble.render(0, 64)
    assert needs["pictures of a call"] == sum(view.rendered.images.nbytes for view in views)
    ids = torch.zeros(12, dtype=torch.int64)
    union = Samples(torch.zeros(12, 48, 16, 16), torch.zeros(12, 16), ids, ids, torch.ones(12))
    assert needs["latents of a round"] == union.latents.nbytes


def test_the_smallest_resolution_counts_and_only_the_pictures_of_one_call() -> None:
    config = load_config(SMOKE, ["particles.micro_batch=1", "render.resolution={linear: {0: 64, 4: 32, 99: 8}}"])
    small = load_config(SMOKE, ["particles.micro_batch=1", "render.resolution=24"])
    # Eight rounds, 0 to 7, on the way from 32 at round 4 to 8 at round 99: 31.2 at round 7, rounded down to 24.
    assert config.render.resolution_at(7) == 24
    assert needs_of(config, 4) == needs_of(small, 4)
    assert needs_of(small, 4)["pictures of a call"] == 3 * 24 * 24 * 4


def test_without_a_score_network_only_the_own_latents_count() -> None:
    sds = load_config(SMOKE, ["objective.kind=sds"])
    assert needs_of(sds, 1)["latents of a round"] == 48 * 16 * 16 * 4


def test_what_fits_is_let_through_and_what_does_not_is_refused_with_both_numbers() -> None:
    config = load_config(SMOKE)
    needed = sum(needs_of(config, 4).values())
    refuse_too_large(config, blank_particle(config, None), LATENTS, 4, needed, "GPU")
    with pytest.raises(ConfigError, match=r"at least .* GiB .*its GPU has .* GiB; take more ranks"):
        refuse_too_large(config, blank_particle(config, None), LATENTS, 4, needed - 1, "GPU")


def test_the_memory_of_the_machine_is_what_the_system_says() -> None:
    if not Path("/proc/meminfo").exists():
        assert host_memory() > 2**28
        return
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 2**28 < host_memory() <= total * 1.01


def test_a_training_that_no_machine_holds_is_refused_before_it_takes_the_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TRAIN, str(SMOKE), str(tmp_path), *HUGE]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, cwd=ROOT)
    lines = done.stdout.splitlines()
    assert len(lines) == len(HUGE)
    for line in lines:
        kind, taken, said = line.split(" ", 2)
        assert kind == "ConfigError" and "would need at least" in said and "GiB" in said
        assert int(taken) < 200


def test_an_image_of_latents_has_no_pictures() -> None:
    config = replace(Config(), render=replace(Config().render, resolution=Schedule.constant(64)))
    image = replace(config.particles, kind="image", image=replace(config.particles.image, space="latent"))
    needs = needs_of(replace(config, particles=image), 8)
    assert needs == {
        "particles": 4 * 4 * 48 * 16 * 16 * 8,
        "pictures of a call": 0,
        "latents of a round": needs["latents of a round"],
    }


TURNS = ("particles.count=20", "particles.resident=6", "particles.host=5", "particles.nerf.log2_table_size=10")


def test_of_particles_that_take_turns_only_those_of_a_turn_need_the_device() -> None:
    """20 of which 6 fit: 4 turns of 5. Of a rank with 10 at most 3 are in one turn."""
    config, particle = load_config(SMOKE, list(TURNS)), blank_particle(load_config(SMOKE, list(TURNS)), None)
    assert needs_of(config, 10)["particles"] == 3 * particle_bytes(particle, config)
    assert needs_of(config, 10)["latents of a round"] == 3 * config.particles.views * LATENTS * 4
    gathered = load_config(SMOKE, [*TURNS, "parallel.exchange=all_gather"])
    assert needs_of(gathered, 10)["latents of a round"] == 5 * config.particles.views * LATENTS * 4
    places = places_of(config, particle, 10)
    assert (places.device, places.host, places.disk) == (3, 2, 8)
    assert places_of(load_config(SMOKE, list(TURNS[:1])), particle, 10).device == 10


def test_a_page_holds_values_and_moments_and_twice_those_where_there_are_good_states() -> None:
    config = load_config(SMOKE, [*TURNS, "schedule.rounds=9", "particles.health.good_every=9"])
    particle = blank_particle(config, None)
    state = dict(make_ensemble(config, None, [3], "cpu").stream())[3]
    size = sum(value.nbytes for name, value in state.items() if name != "adam_step")
    assert page_bytes(particle, config) == size
    longer = load_config(SMOKE, [*TURNS, "schedule.rounds=10", "particles.health.good_every=9"])
    assert page_bytes(particle, longer) == 2 * size


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (Places(4, 11, 0, 100), r"11 particles .* in host memory need .* enough for 10; lower particles\.host"),
        (Places(4, 10, 31, 100), r"31 particles .* in files need .* disk of /pages .* enough for 30; .*page_dir"),
    ],
)
def test_pages_that_do_not_fit_are_refused_with_what_would(places: Places, said: str) -> None:
    refuse_unpaged(replace(places, host=10, disk=30), 1000, 3000, Path("/pages"))
    with pytest.raises(ConfigError, match=said):
        refuse_unpaged(places, 1000, 3000, Path("/pages"))


def test_where_fewer_would_fit_the_refusal_says_how_many() -> None:
    config = load_config(SMOKE, ["particles.count=8"])
    particle = blank_particle(config, None)
    others = sum(needs_of(config, 4).values()) - needs_of(config, 4)["particles"]
    room = others + 3 * particle_bytes(particle, config)
    with pytest.raises(ConfigError, match=r"3 of its 4 particles would fit at a time, .* particles\.resident=6"):
        refuse_too_large(config, particle, LATENTS, 4, room, "GPU")
    fitting = load_config(SMOKE, ["particles.count=8", "particles.resident=6"])
    refuse_too_large(fitting, particle, LATENTS, 4, room, "GPU")
