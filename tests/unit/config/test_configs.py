"""The project's own configurations load and match their names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from distvsd.config import Config, diff, load_config
from distvsd.plan.text import draw
from distvsd.run.planned import plan_run

FOLDER = Path(__file__).parents[3] / "configs"
FILES = sorted(FOLDER.rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_it_loads_and_can_be_planned(path: Path) -> None:
    config = load_config(path)
    text = draw(plan_run(config, nodes=2, gpus_per_node=4))
    assert all(str(stage.schedule.rounds) in text for stage in config.stage_configs)
    assert config.run.dir != Config().run.dir, "runs of two configurations must not share a directory"


def test_no_two_share_a_run_directory() -> None:
    folders = [load_config(path).run.dir for path in FILES]
    assert len(folders) == len(set(folders))


@pytest.mark.parametrize("path", sorted((FOLDER / "ablations").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_ablation_changes_one_thing_of_the_quickstart(path: Path) -> None:
    quickstart = load_config(FOLDER / "quickstart.yaml")
    keys = [key for key, _, _ in diff(quickstart, load_config(path)) if key != "run.dir"]
    assert keys, "nothing is changed"
    assert len({key.split(".")[0] for key in keys}) == 1
    assert len(keys) == 1 or set(keys) == {"objective.t_min", "objective.t_max"}


def test_smoke_is_the_quickstart_but_tiny() -> None:
    smoke, quickstart = load_config(FOLDER / "smoke.yaml"), load_config(FOLDER / "quickstart.yaml")
    allowed = {
        "run.dir",
        "particles.count",
        "particles.nerf.samples_per_ray",
        "schedule.rounds",
        "checkpoint.every",
        "log.every",
    }
    assert {key for key, _, _ in diff(smoke, quickstart)} <= allowed
    assert (smoke.particles.count, smoke.schedule.rounds, smoke.checkpoint.every) == (4, 8, 4)


def test_prolificdreamer_has_the_papers_numbers() -> None:
    config, geometry, texture = load_config(FOLDER / "prolificdreamer.yaml").stage_configs
    assert [stage.schedule.rounds for stage in (config, geometry, texture)] == [25_000, 15_000, 30_000]
    assert [stage.prior.guidance_scale for stage in (config, geometry, texture)] == [7.5, 100, 7.5]
    assert [stage.objective.kind for stage in (config, geometry, texture)] == ["vsd", "sds", "vsd"]
    mesh = geometry.particles.mesh
    assert (mesh.grid, mesh.signal, mesh.normal_consistency, mesh.laplacian) == (52, "normal", 5000, 0.5)
    assert (geometry.particles.learning_rate.at(0), texture.particles.mesh.trained) == (5e-3, "texture")
    assert [stage.cameras.fovy for stage in (config, geometry, texture)] == [(40, 70), (30, 60), (30, 60)]
    assert [config.objective.t_max.at(round) for round in (4999, 5000)] == [0.98, 0.5]
    assert [config.render.resolution_at(round) for round in (4999, 5000)] == [64, 512]
    # The paper's other settings are the defaults.
    nerf = config.particles.nerf
    assert replace(nerf, density_noise=0.0, entropy=0.0, entropy_of="opacity") == Config().particles.nerf
    assert (nerf.density_noise, nerf.entropy, nerf.entropy_of) == (1, 10, "weights")
    assert (config.score.init, config.score.betas, config.score.eps) == ("normal", (0.9, 0.999), 1e-8)
    # Renders of 64 pixels are enlarged to 512, the size that Stable Diffusion was trained at.
    assert [config.encoded_edge(resolution, 512) for resolution in (64, 512)] == [512, 512]


def test_a_stage_without_a_score_network_takes_the_strategy_that_divides_nothing() -> None:
    config = load_config(FOLDER / "prolificdreamer.yaml", ["parallel.strategy=fsdp2"])
    assert [stage.parallel.strategy for stage in config.stage_configs] == ["fsdp2", "flat", "fsdp2"]


def test_scene_has_the_papers_numbers() -> None:
    config = load_config(FOLDER / "scene.yaml")
    nerf = config.particles.nerf
    assert (config.cameras.kind, config.cameras.distance) == ("scene", (0.1, 2.3))
    assert (nerf.blob_density, nerf.blob_radius) == (-10, 2.5)
    assert not config.prior.view_dependent, "inside a scene there is no front"
    # Walls must be inside the cube, and no camera outside.
    assert nerf.bound > nerf.blob_radius > config.cameras.distance[1]
    object_in_it = load_config(FOLDER / "scene.yaml", ["particles.nerf.init=object_in_scene"]).particles.nerf
    assert (object_in_it.shell_density, object_in_it.shell_radius) == (-10, 2.5)


def test_the_room_can_be_trained_with_adaptive_cameras_by_a_change_of_one_word() -> None:
    for kind in ("scene", "adaptive"):
        config = load_config(FOLDER / "room.yaml", [f"cameras.kind={kind}"])
        assert config.cameras.adaptive.bound == config.particles.nerf.bound > config.particles.nerf.blob_radius
