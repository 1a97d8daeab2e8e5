"""Exporting runs on disk whose particles have known surfaces."""

import json
import math
import os
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy
import pytest
import torch
import trimesh

from distvsd.cli import main
from distvsd.errors import RunError, UsageError
from distvsd.looking import export, glb
from distvsd.looking.export import export_run
from distvsd.looking.opened import open_run
from distvsd.looking.views import inspection
from distvsd.render.meshes import Meshes, Surface
from distvsd.render.splat import Splats, splat
from distvsd.run.custom import Custom
from distvsd.run.parts import make_particle
from distvsd.run.train import train
from distvsd.runtime import inside
from tests.small_run import small_config
from tests.unit.looking import solids
from tests.unit.looking.drawing import of_file, of_particle
from tests.unit.looking.solids import by_place, cube, surface

FEW = {"particles.gaussians.capacity": 60}
NOTHING = Surface(Meshes.of([(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64))]), by_place)
BROKEN = surface((torch.full((3, 3), torch.nan), torch.tensor([[0, 1, 2]])))
BROKEN_COLOR = surface(cube(), lambda points: points * torch.nan)
FILES = ["particle-000000", "particle-000001", "particle-000002"]


class Shown:
    """The particle of a run, with given surfaces in the place of its own, one a call."""

    def __init__(self, inner, *shapes):
        self.inner, self.shapes, self.asked = inner, list(shapes), []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def surface(self, parameters, resolution, threshold):
        assert {len(value) for value in parameters.values()} == {1}
        self.asked.append((resolution, threshold))
        return self.shapes[(len(self.asked) - 1) % len(self.shapes)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shared_pipeline):
    """trained(kind): the configuration of a run of three particles of a kind, which were trained for one round."""
    made = {}

    def train_one(kind):
        if kind not in made:
            changes = {
                "particles.kind": kind,
                "particles.mesh.grid": 8,
                **FEW,
                "schedule.rounds": 1,
                "objective.kind": "sds",
            }
            made[kind] = small_config(tmp_path_factory.mktemp(kind) / "run", shared_pipeline("shapes"), **changes)
            assert train(made[kind]) == 0
        return made[kind]

    return train_one


@pytest.fixture(scope="module")
def finished(trained):
    """The configuration of a run of three fields."""
    return trained("nerf")


@pytest.fixture
def run(finished, tmp_path):
    """A copy of its directory, without exports."""
    return Path(shutil.copytree(finished.run.dir, tmp_path / "run"))


@pytest.fixture
def shown(finished):
    """shown(*shapes): the parts of the run with these surfaces."""
    inner = make_particle(finished, None, torch.device("cpu"))
    return lambda *shapes, kind=Shown: Custom(particle=kind(inner, *shapes))


def names(run):
    return sorted(path.name for path in (run / "exports").iterdir())


def test_every_particle_has_a_file_and_all_of_them_one(run, shown):
    done = export_run(run, custom=shown(surface(cube())), texture=0)
    assert names(run) == [*(f"{name}.glb" for name in FILES), "particles.glb"]
    assert sorted(path.name for path in done.paths) == names(run) and done.skipped == {}
    for name in FILES:
        content = solids.Glb.read((run / f"exports/{name}.glb").read_bytes())
        [node] = content.document["nodes"]
        assert node["name"] == name
        assert node["extras"] == {"particle": int(name[-1]), "prompt": "a red cube", "round": 1}
    together = solids.Glb.read((run / "exports/particles.glb").read_bytes())
    assert [node["name"] for node in together.document["nodes"]] == FILES


def test_chosen_particles_only_are_written_and_one_alone_has_no_file_of_all(run, shown):
    export_run(run, "ply", [1], custom=shown(surface(cube())))
    assert names(run) == ["particle-000001.ply"]
    export_run(run, "glb", [1], custom=shown(surface(cube())), texture=0)
    assert names(run) == ["particle-000001.glb", "particle-000001.ply"]
    export_run(run, "glb", [2, 0, 2], custom=shown(surface(cube())), texture=0)
    together = solids.Glb.read((run / "exports/particles.glb").read_bytes())
    assert [node["name"] for node in together.document["nodes"]] == [FILES[0], FILES[2]]


@pytest.mark.parametrize(
    ("form", "texture", "files"),
    [
        ("glb", 64, [".glb"]),
        ("glb", 0, [".glb"]),
        ("obj", 64, [".mtl", ".obj", ".png"]),
        ("obj", 0, [".obj"]),
        ("ply", 64, [".ply"]),
    ],
)
def test_every_form_is_a_file_that_trimesh_reads_as_the_same_solid(run, shown, form, texture, files):
    if texture and form != "ply":
        pytest.importorskip("xatlas")
    export_run(run, form, [1], texture=texture, custom=shown(surface(cube())))
    assert names(run) == [f"particle-000001{suffix}" for suffix in files]
    mesh = trimesh.load_scene(run / f"exports/particle-000001.{form}").to_geometry()
    assert mesh.volume == pytest.approx(1)
    assert mesh.bounds.tolist() == [[-0.5] * 3, [0.5] * 3]


def test_the_lattice_and_the_threshold_reach_the_particle(run, shown, finished):
    custom = shown(surface(cube()))
    export_run(run, "ply", [0], custom=custom, resolution=17, threshold=2.5)
    export_run(run, "ply", [0], custom=custom)
    assert custom.particle.asked == [(17, 2.5), (48, finished.particles.mesh.threshold)]


@pytest.mark.parametrize("wrong", [NOTHING, BROKEN, BROKEN_COLOR])
def test_a_particle_without_a_surface_is_named_and_the_others_are_written(run, shown, wrong):
    said = []
    done = export_run(run, "glb", texture=0, custom=shown(surface(cube()), wrong, surface(cube())), report=said.append)
    assert names(run) == ["particle-000000.glb", "particle-000002.glb", "particles.glb"]
    assert list(done.skipped) == [1]
    assert [line for line in said if "particle 1 " in line and done.skipped[1] in line]
    assert ("empty" in done.skipped[1]) == (wrong is NOTHING) and ("diverged" in done.skipped[1]) == (
        wrong is not NOTHING
    )


def test_a_particle_with_parameters_that_are_not_finite_is_skipped_without_a_look_at_its_surface(
    run, shown, monkeypatch
):
    from distvsd.particles import Ensemble

    parameters_of = Ensemble.parameters_of

    def spoiled(self, particle_id):
        found = parameters_of(self, particle_id)
        return {name: value * torch.nan for name, value in found.items()} if particle_id == 1 else found

    monkeypatch.setattr(Ensemble, "parameters_of", spoiled)
    custom = shown(surface(cube()))
    done = export_run(run, "ply", custom=custom)
    assert list(done.skipped) == [1] and "diverged" in done.skipped[1] and len(custom.particle.asked) == 2


def test_nothing_to_export_is_an_error_that_names_every_particle(run, shown):
    with pytest.raises(RunError, match=r"particle 0: .*particle 1: .*particle 2: "):
        export_run(run, texture=0, custom=shown(NOTHING))
    assert not (run / "exports").exists()


def test_particles_that_have_no_surface_by_their_kind_are_refused(run, shown):
    with pytest.raises(RunError, match="no surface"):
        export_run(run, texture=0, custom=shown(None))


def test_particles_that_the_run_does_not_have_are_wrong_usage(run, shown):
    with pytest.raises(UsageError, match=r"no particle 3, 7; its particles are 0 to 2"):
        export_run(run, "glb", [0, 7, 3], custom=shown(surface(cube())))


def test_gaussians_are_a_ply_of_splats_and_a_glb_of_their_surface(trained, tmp_path):
    config = trained("gaussians")
    run = Path(shutil.copytree(config.run.dir, tmp_path / "run"))
    [path] = export_run(run, "ply", [1]).paths
    header, _, body = path.read_bytes().partition(b"end_header\n")
    assert b"property float f_dc_0" in header
    rows = torch.from_numpy(numpy.frombuffer(body, "<f4").reshape(1, -1, 17).copy())
    # Drawn as a viewer reads the columns, it is the particle.
    means, _, color, opacity, scales, turns = rows.split([3, 3, 3, 1, 3, 4], dim=-1)
    read = Splats(means, scales, turns, opacity[..., 0], (0.5 + color / (2 * math.pi**0.5)).logit())
    opened = open_run(run, "cpu").load([1])
    cameras = inspection(opened)[:, :2]
    expected, covered = opened.render([1], cameras, 32, 0.25)
    seen = splat(read, cameras, 32, 32, "torch")
    found = (seen.color + 0.25 * (1 - seen.opacity)).permute(0, 1, 4, 2, 3)
    assert float(covered.max()) > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    [path] = export_run(run, "glb", [1], texture=0, resolution=16, threshold=0.5).paths
    arrays = solids.Glb.read(path.read_bytes()).primitive("particle-000001")
    assert len(arrays["triangles"]) > 100


def test_too_much_for_one_file_leaves_the_files_of_the_particles(run, shown, monkeypatch):
    said = []
    monkeypatch.setattr(glb.Glb, "fits", property(lambda file: file.count < 2))
    done = export_run(run, texture=0, custom=shown(surface(cube())), report=said.append)
    assert len(done.paths) == 3 and "particles.glb" not in names(run)
    assert any("4 GiB" in line for line in said)


class DeadlyStream:
    """Kills this process when half of what is written has reached the file."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, data):
        self.stream.write(data[: len(data) // 2])
        self.stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("dies_at", ["1.glb", "s.glb", "1.png", "1.mtl", "1.obj", "1.ply"])
def test_an_export_that_is_killed_while_it_writes_leaves_no_half_file(run, shown, monkeypatch, dies_at):
    """Each file is the old one, the new one or missing. An OBJ never stands beside the picture of another one."""
    form = dies_at[2:] if dies_at.endswith(("glb", "ply")) else "obj"
    if form == "obj":
        pytest.importorskip("xatlas")
    old, new = (shown(surface(cube(edge))) for edge in (1.0, 2.0))
    whole = []
    for custom in (old, new, old):
        export_run(run, form, texture=64, custom=custom)
        whole.append({name: (run / "exports" / name).read_bytes() for name in names(run)})
    assert whole[0] == whole[2] != whole[1]
    replacing = inside.replacing

    @contextmanager
    def deadly(root, name):
        with replacing(root, name) as stream:
            yield DeadlyStream(stream) if name.endswith(dies_at) else stream

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(inside, "replacing", deadly)
        export_run(run, form, texture=64, custom=new)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    left = {name: (run / "exports" / name).read_bytes() for name in names(run) if not name.startswith(".")}
    assert all(content in (whole[0][name], whole[1][name]) for name, content in left.items())
    assert left[f"particle-000000.{form}"] == whole[1][f"particle-000000.{form}"]
    for number in range(3):
        group = {name for name in whole[0] if name.startswith(FILES[number])}
        if f"{FILES[number]}.{form}" in left:
            assert any(all(left.get(name) == state[name] for name in group) for state in whole[:2])
    export_run(run, form, texture=64, custom=new)
    assert {name: (run / "exports" / name).read_bytes() for name in names(run)} == whole[1]


def test_a_folder_of_exports_that_is_a_link_is_refused(run, shown, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (run / "exports").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="symbolic link"):
        export_run(run, texture=0, custom=shown(surface(cube())))
    assert not list((tmp_path / "elsewhere").iterdir())


def test_the_command_prints_its_files_and_with_json_what_was_skipped(run, monkeypatch, capsys):
    seen = []

    def stand_in(run_dir, form, ids, **options):
        options["report"]("written a.glb")
        seen.append((form, ids, options["texture"], options["resolution"], options["threshold"]))
        return export.Exported([run_dir / "exports" / "a.glb"], {4: "its surface is empty"})

    monkeypatch.setattr(export, "export_run", stand_in)
    assert main(["export", str(run)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{run}/exports/a.glb\n"
    assert said.err.splitlines()[0] == "written a.glb" and "particle 4: its surface is empty" in said.err
    words = "--format obj --particles 4,0 --texture 0 --resolution 32 --threshold 2.5 --json"
    assert main(["export", str(run), *words.split()]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "written": [f"{run}/exports/a.glb"],
        "skipped": {"4": "its surface is empty"},
    }
    assert seen == [("glb", None, export.TEXTURE, export.RESOLUTION, None), ("obj", (4, 0), 0, 32, 2.5)]


@pytest.mark.parametrize(
    ("words", "allowed"),
    [
        ("--format stl", "glb"),
        ("--particles 9", "0 to 2"),
        ("--particles 1-2", "whole number"),
        ("--texture 9999", "8192"),
        ("--texture 10", "64"),
        ("--resolution 1", "8"),
        ("--threshold 0", "at least"),
    ],
)
def test_what_cannot_be_exported_ends_with_2_and_what_is_allowed(run, words, allowed, capsys):
    try:
        code = main(["export", str(run), *words.split()])
    except SystemExit as ended:
        code = ended.code
    assert code == 2 and allowed in capsys.readouterr().err
    assert not (run / "exports").exists()


def test_images_are_refused_with_what_to_do_instead(trained, tmp_path):
    run = Path(shutil.copytree(trained("image").run.dir, tmp_path / "run"))
    with pytest.raises(RunError, match=r"no surface.*distvsd render"):
        export_run(run, texture=0)


@pytest.mark.parametrize("kind", ["nerf", "mesh"])
@pytest.mark.parametrize("texture", [0, 256])
def test_what_is_read_back_and_drawn_by_another_program_looks_like_the_particle(trained, tmp_path, kind, texture):
    """Rays of one camera at the particle's own surface with its own colours, and at the file."""
    pytest.importorskip("embreex")
    if texture:
        pytest.importorskip("xatlas")
    run = Path(shutil.copytree(trained(kind).run.dir, tmp_path / "run"))
    saved = open_run(run, "cpu")
    threshold = saved.config.particles.mesh.threshold
    [path] = export_run(run, "glb", [1], texture=texture, resolution=24, threshold=threshold).paths
    opened = saved.load([1])
    camera = inspection(opened)[0, 3]
    expected, hit = of_particle(opened, 1, camera, 24, threshold)
    found, also_hit = of_file(path, camera, len(expected))
    assert (hit == also_hit).mean() > 0.999 and hit.mean() > 0.1
    assert numpy.abs(expected - found)[hit & also_hit].mean() < 0.01
