"""Particles that take turns: the same bits as without paging, wherever their numbers are in between."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from distvsd.config import HealthConfig, OccupancyConfig, ParticlesConfig
from distvsd.errors import RunError
from distvsd.faults import begin_round, injected
from distvsd.particles import Adapted, Ensemble, Handed, Paged, Paging, Particle, Resident
from distvsd.particles.store import at_home_in_memory
from distvsd.particles.store.image import Layout
from distvsd.runtime.pages import PageFiles
from tests.unit.particles.shards import FIXED, SMALL, image, nerf, one_round, poisoned
from tests.unit.particles.test_frozen import VOXELS, source

IDS = (0, 1, 2, 3, 4, 5, 6)
TURNS = 3
ROUNDS = 9
GRID = dataclasses.replace(SMALL, occupancy=OccupancyConfig(resolution=8, every=2, threshold=0.01))
KINDS = {"image": image, "nerf": nerf, "frozen": lambda: VOXELS, "changes what is frozen": lambda: nerf(GRID)}
HOMES = ("memory", "disk", "both")


class InTurns(Resident):
    """All on the device, of which those are active that a paged store would have."""

    def active(self, ids: Sequence[int], step: int) -> list[int]:
        return [particle_id for particle_id in ids if particle_id % TURNS == step % TURNS]

    def lease(self, step: int) -> Any:
        self.regroup(1)
        active = self.active(self.ids, step)
        return iter([group for group in self.groups if group.own[0] in active])


def paging(home: str, folder: Path, ids: Sequence[int] = IDS, **more: Any) -> Paging:
    most = {"memory": len(ids), "disk": 0, "both": len(ids) // 2}[home]
    folder.mkdir(exist_ok=True)
    disk = None if home == "memory" else PageFiles(folder, "pages/rank-00000")
    return Paging(TURNS, at_home_in_memory(ids, TURNS, most), disk, **more)


def paged(particle: Particle, where: Paging, ids: Sequence[int] = IDS, size: Any = 1, **health: Any) -> Ensemble:
    config = ParticlesConfig(micro_batch=size, health=HealthConfig(**health))
    return Ensemble(Paged(particle, ids, config, seed=7, paging=where, source=begun(particle, ids)), FIXED, config)


def resident(particle: Particle, ids: Sequence[int] = IDS, **health: Any) -> Ensemble:
    config = ParticlesConfig(micro_batch=1, health=HealthConfig(**health))
    return Ensemble(InTurns(particle, ids, config, seed=7, source=begun(particle, ids)), FIXED, config)


def begun(particle: Particle, ids: Sequence[int]) -> Handed | None:
    """What particles with frozen parameters begin from."""
    return source(ids) if particle is VOXELS else None


def move(particles: Ensemble, steps: Sequence[int], poison: Sequence[int] = ()) -> list[Any]:
    return [
        one_round(particles, step, gradient_of=lambda latents, ids: poisoned(latents, ids, poison)) for step in steps
    ]


def states(particles: Ensemble) -> dict[int, dict[str, Tensor]]:
    return {own: {name: value.clone() for name, value in state.items()} for own, state in particles.stream()}


def assert_same(found: dict[int, dict[str, Tensor]], expected: dict[int, dict[str, Tensor]]) -> None:
    assert found.keys() == expected.keys()
    for own, state in expected.items():
        assert found[own].keys() == state.keys()
        for name, value in state.items():
            assert torch.equal(found[own][name], value), (own, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("home", HOMES)
def test_paging_changes_no_bit_of_any_particle_or_good_state(tmp_path: Path, kind: str, home: str) -> None:
    """Two bad streaks and good states in between: particle 4 is put back, 5 goes on after one bad round."""
    health = {"max_bad": 2, "good_every": 4}
    particles = paged(KINDS[kind](), paging(home, tmp_path), **health)
    reference = resident(KINDS[kind](), **health)
    for steps, poison in ((range(5), ()), (range(5, 9), (5,)), (range(9, 16), (4,)), (range(16, 20), ())):
        assert move(particles, steps, poison) == move(reference, steps, poison)
        assert_same(states(particles), states(reference))
        assert particles.health() == reference.health()
        assert particles.num_bytes == reference.num_bytes
    assert particles.health()[4]["restores"] == 1
    particles.close()


@pytest.mark.parametrize("size", [0, 1, 2])
def test_every_particle_gets_equal_turns_whatever_rank_it_is_on(tmp_path: Path, size: int) -> None:
    particles = paged(image(), paging("both", tmp_path), size=size)
    moved = [sorted(update.healthy) for update in move(particles, range(ROUNDS))]
    assert moved == [[0, 3, 6], [1, 4], [2, 5]] * 3
    store = particles.store
    for ids in ([0, 1, 2], [3, 4], [5, 6]):
        assert store.active(ids, 4) == [own for own in ids if own in moved[4]]


def test_no_more_particles_are_on_the_device_than_take_part_in_a_round(tmp_path: Path) -> None:
    particles = paged(image(), paging("disk", tmp_path), size=2)
    store = particles.store
    assert isinstance(store, Paged) and store.slots == 3
    pointers = set()
    for step in range(2 * TURNS):
        for views in particles.render(step, 4):
            latents = torch.cat([view.rendered.images.flatten(0, 1) for view in views])
            pointers |= {value.data_ptr() for view in views for value in view.group.parameters["image"]}
            particles.update(views, latents, latents.detach(), step)
        particles.finish(step)
    assert len(pointers) == 3


def test_a_group_in_its_backward_pass_is_not_disturbed_by_the_slots_that_change(tmp_path: Path) -> None:
    """Autograd watches whole allocations; the thread writes into the slots of groups that were updated."""
    particles = paged(nerf(), paging("memory", tmp_path))
    for step in range(2 * TURNS):
        for views in particles.render(step, 4):
            for job in list(particles.store._arriving.values()):  # type: ignore[attr-defined]
                job.result()  # what was committed before this render has been exchanged
            latents = torch.cat([view.rendered.images.flatten(0, 1) for view in views])
            particles.update(views, latents, latents.detach(), step)
        assert len(particles.finish(step).healthy) in (2, 3)


def test_a_group_that_was_split_stays_split_in_its_slots(tmp_path: Path) -> None:
    store = Paged(image(), IDS, ParticlesConfig(micro_batch=0), seed=7, paging=paging("memory", tmp_path))
    [group] = store.lease(0)
    first, second = store.split(group)
    store.commit([first, second])
    assert [leased.own for leased in store.lease(1)] == [[1], [4]]
    store.commit(list(store.lease(1)))
    assert [leased.own for leased in store.lease(3)] == [[0], [3, 6]]
    assert store.split(next(store.lease(3))) != []


def test_rounds_may_be_asked_for_in_any_order(tmp_path: Path) -> None:
    order = (0, 5, 5, 1, 2, 8, 0)
    particles, reference = paged(image(), paging("both", tmp_path)), resident(image())
    assert move(particles, order) == move(reference, order)
    assert_same(states(particles), states(reference))


def test_a_state_that_is_loaded_goes_home_with_its_good_state(tmp_path: Path) -> None:
    source = resident(image(), good_every=2)
    move(source, range(5))
    particles = paged(image(), paging("both", tmp_path), good_every=2)
    move(particles, range(3))
    for own, state in source.stream():
        particles.load_state(own, state, source.health()[own])
    assert_same(states(particles), states(source))
    assert move(particles, range(5, 12)) == move(source, range(5, 12))
    assert_same(states(particles), states(source))
    with pytest.raises(KeyError, match="particle 9"):
        particles.store.put(9, {})


def test_particles_begin_from_the_stage_before_a_few_at_a_time(tmp_path: Path) -> None:
    before = image()
    handed = Handed(before, before.init(3, torch.tensor(IDS)))
    asked: list[int] = []

    class Counting:
        def rows(self, rows: slice) -> Handed:
            asked.append(len(range(*rows.indices(len(IDS)))))
            return handed.rows(rows)

    config = ParticlesConfig(micro_batch=2)
    store = Paged(image(), IDS, config, seed=7, paging=paging("disk", tmp_path), source=Counting())
    assert max(asked) == 2 and sum(asked) == len(IDS)
    for row, own in enumerate(IDS):
        assert torch.equal(store.state_of(own)["param/image"], handed.parameters["image"][row])
        assert torch.equal(store.initial(own)["image"], handed.parameters["image"][row])


def test_a_page_on_the_disk_is_a_safetensors_file(tmp_path: Path) -> None:
    particles = paged(VOXELS, paging("disk", tmp_path))
    state = states(particles)[3]
    files = sorted((tmp_path / "pages" / "rank-00000").glob("000003*"))
    found = {name: value for file in files for name, value in safetensors.torch.load_file(file).items()}
    assert_same({3: found}, {3: state})
    particles.close()
    assert not (tmp_path / "pages").exists()


def test_the_tensors_of_a_page_are_aligned_and_share_its_memory() -> None:
    like = {"b": torch.zeros(3, 2), "a": torch.zeros((), dtype=torch.int64), "c": torch.zeros(5, dtype=torch.uint8)}
    layout = Layout(like)
    page = layout.filled(layout.blank(), {"b": torch.ones(3, 2)})
    assert layout.size == page.nbytes and (layout.views(page)["b"] == 1).all() and layout.views(page)["a"] == 0
    assert all(value.data_ptr() % value.element_size() == 0 for value in layout.views(page).values())


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "unreadable"])
@pytest.mark.parametrize("kind", ["image", "frozen"])
def test_a_lost_page_of_a_particle_that_was_saved_since_comes_back_bit_for_bit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, damage: str
) -> None:
    saved: dict[int, dict[str, Tensor]] = {}
    particles = paged(KINDS[kind](), paging("disk", tmp_path, backup=saved.get))
    reference = resident(KINDS[kind]())
    move(particles, range(4))
    move(reference, range(4))
    saved |= states(particles)
    particles.store._vacate()  # type: ignore[attr-defined]  # else it may have been fetched already
    with injected("eio@page.read:particle=2:nth=1" if damage == "unreadable" else ""):
        spoil(tmp_path, 2, damage)
        updates = move(particles, range(4, ROUNDS))
    move(reference, range(4, ROUNDS))
    assert_same(states(particles), states(reference))
    assert [update.found_again for update in updates if update.found_again] == [[2]]
    assert not any(update.set_back for update in updates)
    assert "000002" in caplog.text and "the same state was read from a checkpoint" in caplog.text


def spoil(folder: Path, particle_id: int, damage: str) -> None:
    """Damages all pages of a particle."""
    for file in (folder / "pages" / "rank-00000").glob(f"{particle_id:06d}*"):
        data = bytearray(file.read_bytes())
        if damage == "flip":
            data[len(data) - 3] ^= 1
            file.write_bytes(data)
        elif damage == "cut":
            file.write_bytes(data[:-5])
        elif damage == "delete":
            file.unlink()


def test_a_lost_page_of_a_particle_that_has_moved_goes_back_to_the_saved_state_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved: dict[int, dict[str, Tensor]] = {}
    particles = paged(image(), paging("disk", tmp_path, backup=saved.get))
    move(particles, range(3))
    saved |= states(particles)
    move(particles, range(3, 6))
    assert states(particles)[2]["adam_step"] == 2  # by now its page is written
    spoil(tmp_path, 2, "flip")
    others = states(particles)  # which finds it
    assert torch.equal(others[2]["param/image"], saved[2]["param/image"])
    assert "particle 2 went back to its last saved state" in caplog.text
    [update] = move(particles, [6])
    assert update.set_back == [2] and update.found_again == []
    assert states(particles)[2]["adam_step"] == 1 and states(particles)[5]["adam_step"] == 2


def test_without_a_checkpoint_a_lost_particle_has_its_good_or_its_initial_state(tmp_path: Path) -> None:
    particles = paged(image(), paging("disk", tmp_path), good_every=3)
    first = states(particles)
    spoil(tmp_path, 1, "flip")
    assert_same({1: states(particles)[1]}, {1: first[1]})  # it had not moved
    move(particles, range(3))
    marked = states(particles)
    move(particles, range(3, 6))
    states(particles)
    name = tmp_path / "pages/rank-00000/000002.1.safetensors"  # the second page: the first is the good state
    name.write_bytes(bytes(name.stat().st_size))
    found = dict(particles.stream())[2]
    assert torch.equal(found["param/image"], marked[2]["param/image"])
    assert particles.finish(0).set_back == [2]


def test_a_lost_good_state_is_replaced_and_the_particle_still_has_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    particles = paged(image(), paging("disk", tmp_path), good_every=4)
    move(particles, range(6))
    assert "good/param/image" in states(particles)[2]
    (tmp_path / "pages/rank-00000/000002.0.safetensors").unlink()
    state = dict(particles.stream())[2]
    assert torch.equal(state["good/param/image"], state["param/image"])
    assert particles.health()[2]["good"] == "beside" and "last good state of particle 2" in caplog.text


def test_a_full_disk_costs_no_state_and_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    particles, reference = paged(image(), paging("disk", tmp_path)), resident(image())
    with injected("enospc@page.write"), caplog.at_level(logging.WARNING):
        begin_round(0)
        assert move(particles, range(5)) == move(reference, range(5))
        assert_same(states(particles), states(reference))
    assert caplog.text.count("No space left on device") == 1 and "stay in host memory" in caplog.text
    assert move(particles, range(5, 12)) == move(reference, range(5, 12))
    assert_same(states(particles), states(reference))
    assert particles.store._home._pages._in_memory == {}  # type: ignore[attr-defined]


def test_a_disk_that_is_full_at_the_start_is_refused(tmp_path: Path) -> None:
    where = paging("disk", tmp_path)
    with (
        injected("enospc@page.write:particle=4"),
        pytest.raises(RunError, match=r"000004.*No space left.*particles\.host"),
    ):
        paged(image(), where)


def test_those_at_home_in_memory_are_spread_over_turns_and_never_more_than_asked() -> None:
    for most in range(12):
        chosen = at_home_in_memory(range(40, 50), 3, most)
        assert len(chosen) == min(most, 10)
        by_turn = [sum(own % 3 == turn for own in chosen) for turn in range(3)]
        assert max(by_turn) - min(by_turn) <= 2
    assert at_home_in_memory([], 3, 5) == frozenset()


def test_pages_of_another_process_are_deleted_and_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "pages" / "rank-00000"
    folder.mkdir(parents=True)
    (folder / "000001.0.safetensors").write_bytes(b"old")
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (folder / "000002.0.safetensors").symlink_to(outside)
    particles = paged(image(), paging("disk", tmp_path))
    move(particles, range(3))
    assert outside.read_text() == "mine" and not (folder / "000002.0.safetensors").is_symlink()


def test_a_kind_that_grows_is_adapted_in_its_slots(tmp_path: Path) -> None:
    class Growing(type(image())):  # type: ignore[misc]
        def adapt(self, parameters: Any, keys: Any, factors: Tensor) -> Adapted:
            return Adapted({"image": parameters["image"] + 0.01 * keys.ids.reshape(-1, 1, 1, 1)}, {})

    plain = image()
    growing = Growing(config=plain.config, shape=plain.shape, learning_rate=plain.learning_rate)
    particles, reference = paged(growing, paging("both", tmp_path)), resident(growing)
    assert move(particles, range(ROUNDS)) == move(reference, range(ROUNDS))
    assert_same(states(particles), states(reference))
