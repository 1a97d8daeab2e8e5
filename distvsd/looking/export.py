"""`distvsd export`: the particles of a run as files for other programs, from its newest checkpoint.

One particle at a time is in memory. Each file appears whole or not at all.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from distvsd.errors import RunError, UsageError
from distvsd.looking.glb import Glb
from distvsd.looking.mesh_files import write_mtl, write_obj, write_ply, write_splats
from distvsd.looking.opened import Saved, open_run
from distvsd.looking.solid import NotFiniteError, Solid, Texture, solid_of
from distvsd.particles import Splatted
from distvsd.render.splat import Splats
from distvsd.run.custom import Custom
from distvsd.runtime import inside
from distvsd.runtime.paths import RunPaths

Format = Literal["glb", "obj", "ply"]
TOGETHER = "particles.glb"  # all particles side by side
TEXTURE, RESOLUTION = 1024, 48
_NAMED = 12  # in a message


@dataclass(frozen=True)
class Exported:
    """What an export left behind. skipped: the reason, by particle id."""

    paths: list[Path]
    skipped: dict[int, str]


@dataclass(frozen=True, kw_only=True)
class _Files:
    """Where and how files are written. texture: edge of a picture, 0 for colours of vertices."""

    root: Path
    format: Format
    texture: int
    resolution: int
    threshold: float

    def name(self, file: str) -> str:
        """Of a file of the export, below the root."""
        return f"{RunPaths(self.root).exports.name}/{file}"


def export_run(
    run_dir: Path,
    format: Format = "glb",
    ids: Sequence[int] | None = None,
    *,
    texture: int = TEXTURE,
    resolution: int = RESOLUTION,
    threshold: float | None = None,
    report: Callable[[str], None] = lambda text: None,
    device: str | None = None,
    custom: Custom = Custom(),
) -> Exported:
    """Writes RUN/exports: a file for each particle, `particle-000003.glb`, and of several GLBs one with all of them.

    ids: which particles, None for all. texture: edge of the baked pictures in texels, 0 for colours of vertices, which
    a PLY always has. resolution: cubes along an edge of the lattice on which the surface of a field is found.
    threshold: the density per world unit at which it lies, None for `particles.mesh.threshold`. A particle that is not
    finite or has no surface is skipped. Only one export of a run may be under way.

    Raises what `open_run` raises; UsageError for ids that the run does not have; BackendError where a texture needs
    xatlas and there is none; RunError where the particles have no surface by their kind, where all were skipped, or
    where files cannot be written.
    """
    paths = RunPaths(run_dir)
    paths.prove_writable()  # before the work
    inside.expect_folder(run_dir, paths.exports.name)
    saved = open_run(run_dir, device, custom)
    chosen = _chosen(saved.ids, ids)
    inside.discard_staged(run_dir, paths.exports.name)
    files = _Files(
        root=run_dir,
        format=format,
        texture=0 if format == "ply" else texture,
        resolution=resolution,
        threshold=saved.config.particles.mesh.threshold if threshold is None else threshold,
    )
    done = _export_each(saved, chosen, files, report)
    if not done.paths:
        reasons = [f"particle {particle_id}: {why}" for particle_id, why in done.skipped.items()]
        raise RunError(
            f"{run_dir} has nothing to export ({'; '.join(reasons[:_NAMED])}); train longer, or choose other particles"
        )
    return done


def _export_each(saved: Saved, chosen: Sequence[int], files: _Files, report: Callable[[str], None]) -> Exported:
    """One particle after the other, then the file of all of them."""
    done = Exported([], {})
    with ExitStack() as opened:
        with _spooled(files.root):
            # Without a name, on the disk that the file of all will be on.
            together = Glb(opened.enter_context(tempfile.TemporaryFile(dir=files.root)))
        for particle_id in chosen:
            found = _shape(saved, particle_id, files)
            if isinstance(found, str):
                done.skipped[particle_id] = found
                report(f"particle {particle_id} is skipped: {found}")
                continue
            done.paths.extend(_write(found, f"particle-{particle_id:06d}", files))
            report(f"written {done.paths[-1].name}")
            if files.format == "glb" and isinstance(found, Solid) and len(chosen) > 1:
                with _spooled(files.root):
                    together.add(found)
        if together.count > 1 and together.fits:
            with inside.replacing(files.root, files.name(TOGETHER)) as stream:
                together.write(stream)
            done.paths.append(files.root / files.name(TOGETHER))
        elif together.count > 1:
            report(f"{TOGETHER} is not written: a GLB holds at most 4 GiB; choose fewer particles or a smaller texture")
    return done


def _chosen(known: Sequence[int], asked: Sequence[int] | None) -> list[int]:
    if asked is None:
        return list(known)
    strange = sorted(set(asked) - set(known))
    if strange:
        named = ", ".join(map(str, strange[:_NAMED]))
        raise UsageError(
            f"the run has no particle {named}; its particles are {min(known)} to {max(known)}, give some of them, as "
            "in --particles 0,3"
        )
    return sorted(set(asked))


def _shape(saved: Saved, particle_id: int, files: _Files) -> Solid | Splats | str:
    """What one particle looks like from outside, or why it has no such thing."""
    opened = saved.load([particle_id])
    particle = opened.particle
    stored = opened.ensemble.parameters_of(particle_id)
    parameters = {name: value[None] for name, value in stored.items()}
    if not all(bool(value.isfinite().all()) for value in parameters.values() if value.is_floating_point()):
        return "it diverged, its parameters are not finite"
    facts: dict[str, Any] = {"particle": particle_id, "prompt": saved.config.prompts[particle_id], "round": opened.step}
    with torch.no_grad():
        if files.format == "ply" and isinstance(particle, Splatted):
            return particle.splats(parameters)
        found = particle.surface(parameters, files.resolution, files.threshold)
    if found is None:
        raise RunError(
            f"the particles of {files.root} ({type(particle).__name__}) have no surface, so there is nothing to "
            "export; distvsd render writes pictures of any kind of particle"
        )
    try:
        solid = solid_of(found, files.texture, f"particle-{particle_id:06d}", facts)
    except NotFiniteError as error:
        return f"it diverged, {error}"
    return "its surface is empty" if solid is None else solid


def _write(found: Solid | Splats, stem: str, files: _Files) -> list[Path]:
    """Writes one particle; the file that a program opens is the last."""
    root, name = files.root, files.name(f"{stem}.{files.format}")
    beside: list[Path] = []
    if files.format == "obj" and isinstance(found, Solid) and isinstance(found.paint, Texture):
        # The old OBJ would be shown with the new picture, if this were interrupted before the last of three files.
        inside.delete(root, name)
        with inside.replacing(root, files.name(f"{stem}.png")) as stream:
            stream.write(found.paint.png)
        with inside.replacing(root, files.name(f"{stem}.mtl")) as stream:
            write_mtl(stream, found, f"{stem}.png")
        beside = [root / files.name(f"{stem}{suffix}") for suffix in (".png", ".mtl")]
    with inside.replacing(root, name) as stream:
        match found, files.format:
            case Solid(), "glb":
                alone = Glb(io.BytesIO())
                alone.add(found)
                alone.write(stream)
            case Solid(), "obj":
                write_obj(stream, found, f"{stem}.mtl")
            case Solid(), "ply":
                write_ply(stream, found)
            case Splats(), _:
                write_splats(stream, found)
    return [*beside, root / name]


@contextmanager
def _spooled(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"{run_dir} cannot hold a file of all particles ({error}); free space there") from error
