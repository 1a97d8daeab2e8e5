"""The paper's three stages in one small run: a field, its mesh, the colours of the mesh."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distvsd.checkpoint.reader import newest
from distvsd.cli import main
from distvsd.config import Config
from distvsd.errors import CheckpointError, ConfigError, RunError
from distvsd.faults import injected
from distvsd.looking.opened import load_particles
from distvsd.render.tetrahedra import tet_grid
from distvsd.run.contents import verify
from distvsd.run.train import train
from distvsd.stages import stages_of
from distvsd.testing.ranks import run_ranks
from tests.small_run import three_stages

FOLDERS = ("stages/1-nerf", "stages/2-geometry", "stages/3-texture")
Make = Callable[..., Config]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, prior: Path) -> Config:
    """The run of three stages, trained without a stop; tests must not write to it."""
    config = three_stages(tmp_path_factory.mktemp("whole") / "run", prior)
    assert train(config) == 0
    return config


@pytest.fixture
def configured(tmp_path: Path, prior: Path) -> Make:
    return lambda *more, name="run": three_stages(tmp_path / name, prior, *more)


def folder(config: Config, stage: int) -> Path:
    return Path(config.run.dir) / FOLDERS[stage]


def digest_of(config: Config) -> str:
    return verify(Path(config.run.dir), digest=True)[-1]


def state(config: Config, stage: int, particle: int) -> dict[str, torch.Tensor]:
    found = newest(folder(config, stage) / "checkpoints")
    assert found is not None
    return found.read(f"particles/{particle:06d}.safetensors")


def test_the_surface_moves_in_geometry_and_stays_in_texture_where_the_colours_move(whole: Config) -> None:
    field, geometry, texture = (state(whole, stage, 1) for stage in range(3))
    for name in field:
        if name.startswith("param/"):
            assert torch.equal(field[name], geometry[name]), "geometry keeps the colours"
    colors = [name for name in field if name.startswith("param/grid")]
    assert colors and not all(torch.equal(geometry[name], texture[name]) for name in colors)
    assert {name for name in geometry if name.startswith("adam_m/")} == {"adam_m/values", "adam_m/offsets"}
    for name in ("param/values", "param/offsets"):
        assert torch.equal(geometry[name], texture[name])
        assert f"adam_m/{name.removeprefix('param/')}" not in texture
    assert geometry["param/offsets"].abs().max() > 0
    assert not (folder(whole, 1) / "score").exists()


def test_a_stage_that_trains_no_score_network_saves_none(whole: Config) -> None:
    lines = [line.split()[0] for line in verify(Path(whole.run.dir), digest=True)]
    assert "3-texture/score/adapter" in lines and "2-geometry/score/adapter" not in lines


@pytest.mark.guarantee("G10")
@pytest.mark.parametrize("size", [2, 3])
def test_three_stages_on_several_ranks_have_the_bits_of_one(configured: Make, whole: Config, size: int) -> None:
    """A field, its mesh and its texture, three particles."""
    config = configured()
    assert run_ranks(lambda world: train(config), size) == [0] * size
    assert digest_of(config) == digest_of(whole)


@pytest.mark.guarantee("G9", "G11")
@pytest.mark.parametrize(
    "fault",
    ["eio@round:step=1:nth=2", "eio@round:step=0:nth=3", "eio@load:nth=2", "eio@load:nth=3"],
    ids=["in geometry", "in the first round of texture", "before geometry", "before texture"],
)
def test_a_run_that_died_in_or_between_stages_goes_on_to_the_same_bits(
    configured: Make, whole: Config, fault: str
) -> None:
    """Begun on one rank and finished on two."""
    config = configured("checkpoint.asynchronous=false")

    def attempt() -> int:
        with injected(fault):
            return train(config)

    with pytest.raises((OSError, RunError)):
        attempt()
    assert run_ranks(lambda world: train(config), 2) == [0, 0]
    assert digest_of(config) == digest_of(whole)


@pytest.mark.guarantee("G15")
def test_a_mesh_that_is_nan_for_a_round_changes_no_bit_of_the_others(configured: Make, whole: Config) -> None:
    """In the geometry stage of three."""
    config = configured("objective.kind=sds", "stages.3.schedule.rounds=1")
    calm = configured("objective.kind=sds", "stages.3.schedule.rounds=1", name="calm")
    with injected("nan@render:step=1:nth=2:particle=1") as _:
        assert train(config) == 0
    assert train(calm) == 0
    for particle, is_same in ((0, True), (1, False), (2, True)):
        pair = [state(each, 2, particle)["param/values"] for each in (config, calm)]
        assert torch.equal(*pair) == is_same, particle


@pytest.mark.guarantee("G16")
def test_a_particle_without_a_surface_is_named_quarantined_and_counted_and_the_others_go_on(
    configured: Make, whole: Config, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """One of three fields is too thin for any threshold."""
    fields = load_particles(folder(whole, 0))
    points = tet_grid(6, torch.device("cpu")).points * whole.particles.nerf.bound
    with torch.no_grad():
        most = {}
        for particle in range(3):
            one = {name: value[None] for name, value in fields.ensemble.parameters_of(particle).items()}
            density = fields.particle.field(one)
            assert density is not None
            most[particle] = density(points[None]).max().item()
    thinnest, second, _ = sorted(most, key=lambda particle: most[particle])
    threshold = 64 * math.sqrt(most[thinnest] * most[second])  # it is halved six times
    health = ["particles.health.max_bad=1", "particles.health.max_restores=0"]
    gently = "stages.2.particles.learning_rate=0.001"
    config = configured(f"particles.mesh.threshold={threshold}", gently, *health)
    assert train(config) == 0
    capfd.readouterr()
    assert f"particle {thinnest} has no surface" in caplog.text
    assert main(["evaluate", config.run.dir, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    details = {detail["id"]: detail for detail in found["particles_detail"]}
    assert found["quarantined"] == 1 and details[thinnest]["quarantined"] and details[thinnest]["empty"]


def test_a_run_may_begin_with_the_particles_of_another(configured: Make, whole: Config, prior: Path) -> None:
    """With the seed of the second stage a run from the first stage's end is the second stage."""
    second = stages_of(whole)[1].config
    changes = ["stages=[]", "objective.kind=sds", "particles.kind=mesh", "particles.mesh.signal=shaded"]
    changes += ["particles.mesh.laplacian=1", f"run.init_from={folder(whole, 0)}", f"run.seed={second.run.seed}"]
    alone = configured(*changes)
    assert train(alone) == 0
    assert verify(Path(alone.run.dir), digest=True) == verify(folder(whole, 1), digest=True)


def test_from_a_run_of_stages_it_begins_where_the_newest_one_ended(configured: Make, whole: Config) -> None:
    changes = ["stages=[]", "particles.kind=mesh", "particles.mesh.trained=texture", "schedule.rounds=1"]
    frozen = ["particles.learning_rate=0", "particles.network_learning_rate=0"]
    config = configured(*changes, *frozen, f"run.init_from={whole.run.dir}")
    assert train(config) == 0
    found = newest(Path(config.run.dir) / "checkpoints")
    assert found is not None
    expected, begun = state(whole, 2, 2), found.read("particles/000002.safetensors")
    names = [name for name in expected if name.startswith("param/")]
    assert names and all(torch.equal(expected[name], begun[name]) for name in names)


@pytest.mark.parametrize(
    ("make", "error", "word"),
    [
        (lambda root: root / "nowhere", RunError, "no config.yaml"),
        (lambda root: fresh(root), RunError, "without a checkpoint"),
    ],
    ids=["not a run", "an untrained run"],
)
def test_a_run_that_another_cannot_begin_from_is_named(
    configured: Make, whole: Config, tmp_path: Path, make: Callable[[Path], Path], error: type[Exception], word: str
) -> None:
    shutil.copy(Path(whole.run.dir) / "config.yaml", tmp_path / "config.yaml")
    with pytest.raises(error, match=word):
        train(configured(f"run.init_from={make(tmp_path)}"))


def fresh(root: Path) -> Path:
    (root / "fresh").mkdir()
    shutil.copy(root / "config.yaml", root / "fresh" / "config.yaml")
    return root / "fresh"


def test_particles_of_another_number_or_kind_are_refused(configured: Make, whole: Config) -> None:
    with pytest.raises((ConfigError, CheckpointError), match="3"):
        train(configured(f"run.init_from={folder(whole, 0)}", "particles.count=2"))
    with pytest.raises(ConfigError, match="cannot begin from"):
        train(configured(f"run.init_from={folder(whole, 1)}", name="other"))


def damage(config: Config, stage: int, step: int) -> Path:
    """Flips a byte of a particle in a checkpoint; returns its folder."""
    checkpoint = folder(config, stage) / f"checkpoints/step-{step:08d}"
    particle = checkpoint / "particles/000001.safetensors"
    particle.write_bytes(particle.read_bytes()[:-1] + bytes([particle.read_bytes()[-1] ^ 1]))
    return checkpoint


@pytest.mark.guarantee("G3")
def test_rounds_of_a_damaged_hand_over_are_trained_again(configured: Make, whole: Config) -> None:
    """While the next stage has not begun; to the bits of the undamaged run."""
    config = configured()
    shutil.copytree(whole.run.dir, config.run.dir)
    for stage in (1, 2):
        shutil.rmtree(folder(config, stage))
    damage(config, 0, 2)
    assert train(config) == 0
    assert digest_of(config) == digest_of(whole)


@pytest.mark.guarantee("G3")
def test_once_the_next_stage_has_begun_no_older_state_is_taken_for_a_damaged_hand_over(
    configured: Make, whole: Config
) -> None:
    """Its particles go back to what was handed over, should they diverge."""
    config = configured()
    shutil.copytree(whole.run.dir, config.run.dir)
    shutil.rmtree(folder(config, 2))
    shutil.rmtree(folder(config, 1) / "checkpoints/step-00000003")
    damaged = damage(config, 0, 2)
    with pytest.raises(CheckpointError, match="step-00000002 cannot be used"):
        train(config)
    shutil.rmtree(damaged)
    assert train(config) == 0, "without it, the one before is the hand-over: the user chose it"
