"""Fields with an occupancy grid: how it is read, what is left out, how it is kept, and that no NaN hides in it."""

import dataclasses
import math

import pytest
import torch

from distvsd.cameras import rays
from distvsd.config import HealthConfig, OccupancyConfig
from distvsd.particles import Handed, Keys
from distvsd.particles.occupancy import Occupancy
from distvsd.render import HashGrid
from distvsd.render.packed import march
from distvsd.testing import check_particle
from distvsd.vsd.rng import Purpose, uniform
from tests.unit.particles.shards import AROUND, SMALL, nerf, one_round, shard

GRID = OccupancyConfig(resolution=8, every=2, threshold=0.01)
# A ball of radius 0.25 that fades to nothing within a tenth: raw densities of -60 and below leave no light to stop.
BALL = dataclasses.replace(SMALL, blob_density=60.0, blob_radius=0.25, init_scale=0.01, occupancy=GRID)
WITH, WITHOUT = nerf(BALL), nerf(dataclasses.replace(BALL, occupancy=OccupancyConfig()))
IDS = torch.tensor([4, 9, 2])


def keys(step=0, ids=IDS):
    return Keys(0, ids, step)


def read(particle=WITH, step=1, parameters=None):
    """Fresh parameters whose grid was read once."""
    parameters = parameters or particle.init(0, IDS)
    return parameters | particle.adapt(parameters, keys(step), torch.ones(3)).parameters


def without(parameters):
    return {name: value for name, value in parameters.items() if name != "occupancy"}


def leaves(parameters):
    return {name: value.detach().clone().requires_grad_(name != "occupancy") for name, value in parameters.items()}


def gradients(particle, parameters, step=3):
    parameters = leaves(parameters)
    cameras = AROUND.sample(0, IDS, step, 2, None)
    rendered = particle.render(parameters, cameras, 16, keys(step))
    weights = torch.linspace(-1, 2, rendered.images.numel()).reshape(rendered.images.shape)
    ((rendered.images * weights).sum() + rendered.penalty.sum()).backward()
    return rendered, {name: value.grad for name, value in parameters.items() if name != "occupancy"}


@pytest.mark.parametrize("every", [1, 2])
def test_a_field_with_a_grid_conforms(every):
    config = dataclasses.replace(BALL, occupancy=dataclasses.replace(GRID, every=every))
    check_particle(nerf(config), frozen={"occupancy"})


def test_without_a_grid_there_is_no_parameter_and_nothing_adapts():
    assert "occupancy" not in WITHOUT.init(0, IDS)
    assert all(WITHOUT.adapt(WITHOUT.init(0, IDS), keys(step), torch.ones(3)) is None for step in range(40))


def test_a_grid_that_was_never_read_leaves_nothing_out():
    parameters = WITH.init(0, IDS)
    (ours, our_gradients), (dense, expected) = gradients(WITH, parameters), gradients(WITHOUT, without(parameters))
    assert torch.equal(ours.images, dense.images) and torch.equal(ours.penalty, dense.penalty)
    assert all(torch.equal(our_gradients[name], value) for name, value in expected.items())


def test_the_grid_is_read_in_the_rounds_that_the_configuration_says():
    parameters = WITH.init(0, IDS)
    due = [step for step in range(8) if WITH.adapt(parameters, keys(step), torch.ones(3)) is not None]
    assert due == [1, 3, 5, 7]


def test_a_reading_is_the_share_of_light_that_a_cell_stops_at_most_among_its_neighbours():
    """Density 2 where x > 0.5 in a cube of half edge 1.5 and 3 cells: only the last cells along x have matter, and they
    stop 1 - e^(-2); with their neighbours, cells 1 and 2 do."""
    occupancy = Occupancy(OccupancyConfig(resolution=3, threshold=0.5, decay=0.5), bound=1.5)
    grid = occupancy.refreshed(occupancy.init(IDS), lambda points: 2.0 * (points[..., 0] > 0.5), keys())
    stopped = 1 - math.exp(-2)
    expected = torch.tensor([0, stopped, stopped]).expand(3, 3, 3, 3)
    torch.testing.assert_close(grid, expected)
    assert torch.equal(occupancy.cells(grid), expected > 0)
    # What was there fades: half of it, a quarter; below the threshold of a half it is empty at once.
    later = occupancy.refreshed(grid, lambda points: torch.zeros(points.shape[:2]), keys(1))
    torch.testing.assert_close(later, expected / 2)
    # 0.43 in two thirds of the cells is below the threshold: nothing would be left, and so everything is read.
    assert occupancy.cells(later).all()


def test_the_points_of_a_reading_are_one_in_each_cell_keyed_by_particle_and_round():
    seen = []
    occupancy = Occupancy(GRID, bound=0.6)

    def field(points):
        seen.append(points)
        return torch.ones(points.shape[:2])

    for step, ids in ((0, IDS), (0, IDS[1:2]), (1, IDS)):
        occupancy.refreshed(occupancy.init(ids), field, keys(step, ids))
    first, alone, later = seen
    cells = ((first + 0.6) / 1.2 * 8).floor().long()
    order = (cells[..., 2] * 8 + cells[..., 1]) * 8 + cells[..., 0]
    assert torch.equal(order, torch.arange(512).expand(3, -1))
    assert torch.equal(alone[0], first[1]) and not torch.equal(first, later) and not torch.equal(first[0], first[1])


def test_what_is_empty_changes_no_picture_no_penalty_and_no_gradient():
    """Outside of the ball the density is softplus of at most -30 within a cell: nothing to single precision."""
    config = dataclasses.replace(BALL, sparsity=1.0, coverage=1.0, coverage_range=(0.5, 0.7), entropy=1.0)
    for changed in ({}, {"entropy_of": "weights"}, {"density_noise": 0.5}):
        fields = dataclasses.replace(config, **changed)
        grid, plain = nerf(fields), nerf(dataclasses.replace(fields, occupancy=OccupancyConfig()))
        parameters = read(grid)
        assert grid.occupancy.cells(parameters["occupancy"]).float().mean() < 0.8
        (ours, found), (dense, expected) = gradients(grid, parameters), gradients(plain, without(parameters))
        torch.testing.assert_close(ours.images, dense.images, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.opacity, dense.opacity, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.penalty, dense.penalty, rtol=1e-5, atol=1e-6)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-5)


def points_read(monkeypatch, action):
    """Points of all particles at which the grid of features is read."""
    counted, encode = [], HashGrid.encode
    with monkeypatch.context() as patch:
        patch.setattr(HashGrid, "encode", lambda *of: counted.append(of[2][..., 0].numel()) or encode(*of))
        action()
    return sum(counted)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_render_reads_the_field_in_occupied_cells_only(monkeypatch, threads):
    """With one thread at no other point; with three the particles are padded to the longest."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    cameras, grid = AROUND.sample(0, IDS, 0, 2, None), read()
    every = points_read(monkeypatch, lambda: WITH.render(WITH.init(0, IDS), cameras, 16, keys()))
    some = points_read(monkeypatch, lambda: WITH.render(grid, cameras, 16, keys()))
    looked = points_read(monkeypatch, lambda: WITH.view(grid, cameras, 16, 0.5))
    assert every == looked == 3 * 2 * 16 * 16 * SMALL.samples_per_ray
    assert points_read(monkeypatch, read) == 3 * 8**3
    centres, directions = rays(cameras, 16, 16)
    origins = centres[:, :, None, None].expand_as(directions).flatten(1, 3)
    jitter = uniform(0, Purpose.RAY_JITTER, IDS, 0, (2, 16, 16)).flatten(1)
    cells = WITH.occupancy.cells(grid["occupancy"])
    packed = march(cells, origins, directions.flatten(1, 3), SMALL.bound, SMALL.samples_per_ray, jitter)
    counts = packed.particle_ends.diff(prepend=torch.zeros(1, dtype=torch.int64))
    assert some == (int(counts.sum()) if threads == 1 else 3 * int(counts.max())) < 0.7 * every


def test_matter_that_appears_in_an_empty_cell_is_found_at_the_next_reading():
    parameters = read()
    corner = WITH.occupancy.cells(parameters["occupancy"])[:, 0, 0, 0]
    assert not corner.any()
    parameters["decoder_bias"] = parameters["decoder_bias"] + torch.tensor([200.0, 0, 0, 0])
    assert WITH.occupancy.cells(read(step=3, parameters=parameters)["occupancy"]).all()


def test_a_particle_that_has_faded_is_read_everywhere():
    faded = read(parameters=WITH.init(0, IDS) | {"decoder_bias": torch.full((3, 4), -1000.0)})
    assert (faded["occupancy"] == 0).all() and WITH.occupancy.cells(faded["occupancy"]).all()


def test_cameras_that_see_no_matter_draw_the_background():
    """The ball is in one corner of the cube for the grid; cameras look at another part of it from inside."""
    parameters = WITH.init(0, IDS)
    grid = torch.zeros(3, 8, 8, 8)
    grid[:, 7, 7, 7] = 1.0
    cameras = AROUND.sample(0, IDS, 0, 1, None)
    cameras.fovy.fill_(0.01)
    rendered = WITH.render(leaves(parameters | {"occupancy": grid}), cameras, 8, keys())
    assert not rendered.opacity.any() and rendered.images.isfinite().all() and rendered.penalty.isfinite().all()


@pytest.mark.parametrize("broken", ["occupancy", "decoder_bias", "all"])
def test_a_nan_is_seen_in_its_own_particle_and_in_no_other(broken):
    parameters = read()
    expected, expected_gradients = gradients(WITH, parameters)
    lost = {name: value.detach().clone() for name, value in parameters.items()}
    for name in lost if broken == "all" else [broken]:
        lost[name][1] = math.nan
    rendered, found = gradients(WITH, lost)
    others = [0, 2]
    torch.testing.assert_close(rendered.images[others], expected.images[others], rtol=0, atol=1e-6)
    for name, value in expected_gradients.items():
        torch.testing.assert_close(found[name][others], value[others], rtol=1e-4, atol=1e-5)
    # A grid of NaN reads everything; what it reads is sound. Any other NaN must reach the picture.
    assert rendered.images[1].isfinite().all() == (broken == "occupancy")


def move(particles, step, poison=False):
    return one_round(particles, step, 8, lambda latents, ids: latents * (math.nan if poison else 1))


def copies(particles):
    return {i: {name: value.clone() for name, value in state.items()} for i, state in particles.stream()}


def same(first, second):
    return all(torch.equal(value, second[name]) or value.isnan().any() for name, value in first.items())


def test_the_grid_is_saved_with_the_particle_and_is_no_part_of_its_good_state():
    particles = shard(WITH, [4, 9], sampler=AROUND)
    particles.mark_good()
    for step in range(2):
        move(particles, step)
    for _, state in particles.stream():
        assert (state["param/occupancy"] >= 0).all() and "good/param/occupancy" not in state
        assert "adam_m/occupancy" not in state and "good/param/grid0" in state


def test_a_shard_that_was_saved_goes_on_with_the_same_bits():
    first, second = (shard(WITH, [4, 9], sampler=AROUND, micro_batch=1) for _ in range(2))
    for step in range(3):
        move(first, step)
    for particle_id, state in copies(first).items():
        second.load_state(particle_id, state, first.health()[particle_id])
    for step in range(3, 7):
        for particles in (first, second):
            assert move(particles, step).healthy == [4, 9]
    assert all(same(state, copies(second)[i]) for i, state in copies(first).items())


def test_a_particle_that_is_put_back_has_a_grid_that_was_never_read():
    health = HealthConfig(max_bad=2, max_restores=1)
    particles = shard(WITH, [4, 9], sampler=AROUND, health=health)
    move(particles, 0)
    particles.mark_good()
    good = copies(particles)
    move(particles, 1)
    assert (copies(particles)[4]["param/occupancy"] >= 0).all()
    for step in (2, 3):
        update = move(particles, step, poison=True)
    assert update.restored == [4, 9]
    for particle_id, state in copies(particles).items():
        assert (state["param/occupancy"] == -1).all()
        assert torch.equal(state["param/grid1"], good[particle_id]["param/grid1"])
    # The next reading is that of the state it was put back to, moved once.
    move(particles, 4)
    move(particles, 5)
    assert all((state["param/occupancy"] >= 0).all() for state in copies(particles).values())


def test_a_particle_that_skips_the_round_keeps_its_grid():
    particles = shard(WITH, [4, 9], sampler=AROUND)
    move(particles, 0)
    before = copies(particles)
    assert move(particles, 1, poison=True).healthy == []
    assert all(torch.equal(state["param/occupancy"], before[i]["param/occupancy"]) for i, state in particles.stream())


@pytest.mark.parametrize(("before", "after"), [(WITH, WITH), (WITH, WITHOUT), (WITHOUT, WITH)])
def test_the_next_stage_takes_the_field_over_and_reads_a_grid_of_its_own(before, after):
    parameters = before.init(1, IDS)
    if before is WITH:
        parameters = read(parameters=parameters)
    made = after.init(99, IDS, Handed(before, parameters))
    assert list(made) == list(after.init(0, IDS)) and torch.equal(made["grid0"], parameters["grid0"])
    assert after is WITHOUT or (made["occupancy"] == -1).all()
