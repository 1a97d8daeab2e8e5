"""What happens to a particle that keeps failing; a resume at any point changes nothing."""

import pytest
import torch

from distvsd.config import HealthConfig
from distvsd.errors import CheckpointError
from distvsd.faults import begin_round, injected
from distvsd.particles.good import most_copies, saved_place
from distvsd.particles.health import Health
from tests.unit.particles.shards import image, one_round, poisoned, shard

IMAGES = image()
LATENTS = image((4, 2, 2))


def ensemble(ids=(0, 1, 2), micro_batch=0, particle=IMAGES, views=1, **limits):
    health = HealthConfig(**({"max_bad": 2, "max_restores": 1, "restore_rate": 0.25} | limits))
    return shard(particle, ids, health=health, micro_batch=micro_batch, views=views)


def move(particles, step, poison=(), gradient_of=lambda latents: latents):
    """Makes one update towards zero and returns it; the gradients of the particles `poison` are NaN."""
    begin_round(step)
    return one_round(particles, step, gradient_of=lambda latents, ids: poisoned(gradient_of(latents), ids, poison))


def copy_of(particles, particle_id):
    return {name: value.clone() for name, value in particles.state()[particle_id].items()}


def present_of(particles, particle_id):
    """The particle's present state, without its good one."""
    return {name: value for name, value in copy_of(particles, particle_id).items() if not name.startswith("good/")}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_bad_rounds_count_only_in_a_row():
    particles = ensemble(max_bad=3)
    for step, poison in enumerate([[1], [1], [], [1], [1]]):
        assert move(particles, step, poison).restored == []
    assert particles.health()[1] == {"bad": 2, "total": 4, "restores": 0, "quarantined": False, "good": "initial"}
    assert particles.health()[0] == Health().to_json() | {"good": "initial"}
    assert move(particles, 5, [1]).restored == [1]


def test_a_particle_goes_back_to_where_it_was_marked_good_and_moves_more_slowly_from_there():
    particles = ensemble()
    move(particles, 0)
    particles.mark_good()
    good = present_of(particles, 1)
    move(particles, 1)
    assert not same(present_of(particles, 1), good)
    assert move(particles, 2, [1]).restored == []
    update = move(particles, 3, [1])
    assert update.restored == [1] and update.unhealthy == [1] and update.healthy == [0, 2]
    assert same(present_of(particles, 1), good)
    twin = ensemble((1,))
    twin.load_state(1, good)
    move(particles, 4), move(twin, 4)
    # Moments and gradient are the same, so the changes differ only by the factor on the rate.
    changes = [state["param/image"] - good["param/image"] for state in (present_of(particles, 1), present_of(twin, 1))]
    torch.testing.assert_close(changes[0], 0.25 * changes[1], rtol=1e-5, atol=1e-8)


def test_a_particle_that_was_never_marked_good_begins_anew():
    particles = ensemble()
    start = present_of(particles, 1)
    move(particles, 0)
    move(particles, 1, [1])
    assert move(particles, 2, [1]).restored == [1]
    assert same(present_of(particles, 1), start)


def test_a_state_inside_a_bad_streak_is_not_marked_good():
    particles = ensemble()
    particles.mark_good()
    good = present_of(particles, 1)
    move(particles, 0)
    move(particles, 1, [1])
    particles.mark_good()
    assert move(particles, 2, [1]).restored == [1]
    assert same(present_of(particles, 1), good)


def test_a_quarantined_particle_keeps_its_last_good_state_and_the_others_move_on():
    particles = ensemble(max_restores=0)
    particles.mark_good()
    good = present_of(particles, 1)
    move(particles, 0)
    move(particles, 1, [1])
    assert move(particles, 2, [1]).quarantined == [1]
    assert particles.quarantined == [1]
    before = present_of(particles, 0)
    update = move(particles, 3)  # its gradient would be finite again
    assert update.healthy == [0, 2] and update.unhealthy == [] and update.absent == [1]
    assert same(present_of(particles, 1), good) and not same(present_of(particles, 0), before)


@pytest.mark.parametrize("save_after", range(10))
def test_a_resume_at_any_point_of_a_streak_ends_with_the_same_bits(save_after):
    """Rounds 0 to 10; states are marked good after 3 and 7. The particle fails in 4 to 6 and is restored in 5; it fails
    again in 8 and 9 and is quarantined in 9. The run that is not interrupted saves nothing."""
    poison = [[], [], [], [], [1], [1], [1], [], [1], [1], []]
    whole, resumed = ensemble(good_every=4), ensemble((2, 1, 0), micro_batch=1, good_every=4)
    for step, struck in enumerate(poison):
        move(whole, step, struck)
        if step > save_after:
            move(resumed, step, struck)
        if step == save_after:
            health = whole.health()
            for particle_id in whole.ids:
                resumed.load_state(particle_id, copy_of(whole, particle_id), health[particle_id])
    assert whole.health() == {particle_id: resumed.health()[particle_id] for particle_id in whole.ids}
    assert whole.quarantined == [1] and whole.health()[1]["restores"] == 1
    for particle_id in whole.ids:
        assert same(copy_of(whole, particle_id), copy_of(resumed, particle_id)), particle_id


def test_only_a_good_state_that_is_neither_the_present_nor_the_initial_one_lies_beside_it_in_the_checkpoint():
    particles = ensemble()
    plain = set(copy_of(particles, 1))
    beside = plain | {f"good/{name}" for name in plain}
    size = particles.num_bytes
    move(particles, 0)
    assert set(copy_of(particles, 1)) == plain and particles.health()[1]["good"] == "initial"
    particles.mark_good()
    assert set(copy_of(particles, 1)) == plain and particles.health()[1]["good"] == "present"
    move(particles, 1, [1])
    for particle_id in (0, 1):
        assert set(copy_of(particles, particle_id)) == beside and particles.health()[particle_id]["good"] == "beside"
    assert particles.num_bytes == 2 * size
    particles.mark_good()
    assert set(copy_of(particles, 0)) == plain and set(copy_of(particles, 1)) == beside


def test_states_are_marked_good_by_the_number_of_the_round():
    particles = ensemble()
    for step in (50 - 2, 50 - 1, 50):
        move(particles, step)
        good = {0: "initial", 1: "present", 2: "beside"}[step - 50 + 2]
        assert [record["good"] for record in particles.health().values()] == [good] * 3


@pytest.mark.parametrize(
    ("rounds", "every", "copies"),
    [(3 * 50, 50, 1), (50 - 1, 0, 1), (50 + 1, 0, 2), (2 * 50, 30, 2)],
)
def test_the_largest_checkpoint_is_known_before_the_first_round(rounds, every, copies):
    assert most_copies(rounds, every, 50) == copies


@pytest.mark.parametrize(
    ("record", "has_copy", "place"),
    [
        (None, False, "present"),
        ({"bad": 0}, False, "present"),
        ({"bad": 2}, False, "initial"),
        ({"bad": 2}, True, "beside"),
        ({"bad": 0, "good": "initial"}, False, "initial"),
    ],
)
def test_manifests_from_before_good_states_had_a_schedule_mean_what_they_meant(record, has_copy, place):
    assert saved_place(record, has_copy) == place


@pytest.mark.parametrize(
    ("record", "said"),
    [({"good": "else"}, "good = 'else' .*altered"), ({"good": "beside"}, "good/param/image is missing")],
)
def test_a_record_whose_good_state_is_nowhere_is_refused(record, said):
    particles = ensemble()
    with pytest.raises(CheckpointError, match=said):
        particles.load_state(1, copy_of(particles, 1), record)


@pytest.mark.parametrize("record", [{"bad": -1}, {"total": "2"}, {"quarantined": 1}, {"restores": True}])
def test_an_impossible_record_in_a_manifest_is_refused(record):
    particles = ensemble()
    before = copy_of(particles, 1)
    with pytest.raises(CheckpointError, match=rf"{next(iter(record))} = .*altered"):
        particles.load_state(1, before, record)


def test_a_manifest_without_health_means_a_particle_that_never_failed():
    assert Health.from_json(None) == Health.from_json({}) == Health()
    assert Health.from_json(Health(3, 5, 1, True).to_json()) == Health(3, 5, 1, True)


def test_a_gradient_whose_square_overflows_counts_as_not_finite():
    """The second moment would become infinite, and the particle would never move again, without any NaN."""
    particles = ensemble()
    update = move(particles, 0, gradient_of=lambda latents: torch.where(latents == latents[1], 1e20, latents))
    assert update.unhealthy == [1] and update.healthy == [0, 2]
    assert all(value.isfinite().all() for state in particles.state().values() for value in state.values())


def test_a_nan_that_the_backward_pass_swallows_is_seen_all_the_same():
    """The latents of one view are not finite, and the encoder's derivative there is zero."""
    particles = ensemble(views=2)
    (views,) = particles.render(0, 4)
    images = torch.cat([view.rendered.images.flatten(0, 1) for view in views])
    hit = torch.arange(6).reshape(-1, 1, 1, 1) == 3
    latents = torch.where(hit, torch.nan, images)  # no gradient flows through the other branch
    particles.update(views, latents, torch.ones_like(images), 0)
    update = particles.finish(0)
    assert update.unhealthy == [1] and update.healthy == [0, 2]


def test_a_group_out_of_memory_is_halved_and_the_halves_go_on_with_its_state():
    whole, halved = ensemble((0, 1, 2, 3, 4)), ensemble((0, 1, 2, 3, 4))
    move(whole, 0), move(halved, 0)
    with injected("oom@render:particle=3:nth=1; oom@render:particle=3:nth=1"):
        move(halved, 1)
    move(whole, 1)
    assert [group.own for group in halved.store.groups] == [[0, 1], [2], [3, 4]]
    for step in (2, 3):
        move(whole, step), move(halved, step)
    for particle_id in range(5):
        for name, value in copy_of(whole, particle_id).items():
            torch.testing.assert_close(copy_of(halved, particle_id)[name], value, rtol=0, atol=1e-7)


@pytest.mark.parametrize("particle", [IMAGES, LATENTS])
def test_a_particle_that_does_not_fit_alone_is_nan_and_skips_the_round(particle):
    particles, without = ensemble((0, 1), 1, particle, views=2), ensemble((0,), 1, particle, views=2)
    before = copy_of(particles, 1)
    with injected("oom@render:particle=1:step=0"):
        views = [view for part in particles.render(0, 4) for view in part]
        assert views[1].rendered.images.shape == views[0].rendered.images.shape
        assert views[1].rendered.images.isnan().all() and views[0].rendered.images.isfinite().all()
        update = move(particles, 0)
    move(without, 0)
    assert update.unhealthy == [1] == update.out_of_memory and update.healthy == [0]
    assert same(copy_of(particles, 1), before) and same(copy_of(particles, 0), copy_of(without, 0))


def test_a_rank_whose_only_particle_does_not_fit_still_has_an_update():
    particles = ensemble((1,))
    with injected("oom@render"):
        assert move(particles, 0).unhealthy == [1]


def test_a_backward_pass_out_of_memory_moves_nobody_and_leaves_no_gradient_behind():
    particles, twin = ensemble(), ensemble()
    with injected("oom@gradient:step=0"):
        update = move(particles, 0)
    assert update.unhealthy == [0, 1, 2] == update.absent == update.out_of_memory and update.healthy == []
    assert [group.own for group in particles.store.groups] == [[0], [1, 2]]
    assert move(particles, 1).out_of_memory == []
    move(twin, 1)
    for particle_id in range(3):
        for name, value in copy_of(twin, particle_id).items():
            torch.testing.assert_close(copy_of(particles, particle_id)[name], value, rtol=0, atol=1e-7)


def test_another_error_of_a_renderer_passes_through():
    particles = ensemble()
    with injected("eio@render:particle=1"), pytest.raises(OSError):
        list(particles.render(0, 4))
