"""`distvsd render`: contact sheets and turntables of the particles of a run, from its newest checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from distvsd.cameras import Cameras
from distvsd.looking.images import contact_sheet, mosaic, save_png, turntable
from distvsd.looking.opened import Opened, load_particles
from distvsd.looking.views import groups, inspection, render_group
from distvsd.runtime.paths import RunPaths

FRAMES = 36
SINGLE_TURNTABLES = 16  # more particles than that share one picture
MOSAIC_PARTICLES = 64  # in one picture; more continue on the next
SHEET_CELLS = 4096  # of one contact sheet; more particles continue on the next
SHEET_ROWS = 64


def render_run(run_dir: Path, report: Callable[[str], None] = lambda text: None) -> list[Path]:
    """Writes RUN/renders and returns the paths: contact sheets of all particles, then turntables (not of images).

    Up to 16 particles have a turntable each, `particle-000003.mp4`; more share `turntable.mp4`, up to 64 on one, and
    then numbered ones.
    Raises what loading raises: RunError for a folder that is no run, CheckpointError where none can be read. RunError
    also where they cannot be written.
    """
    RunPaths(run_dir).prove_writable()  # before the work
    return render_particles(load_particles(run_dir), run_dir, report)


def render_particles(opened: Opened, run_dir: Path, report: Callable[[str], None] = lambda text: None) -> list[Path]:
    """Writes contact sheets and turntables of these particles into RUN/renders; see `render_run`."""
    paths = contact_sheets(opened, run_dir)
    report(f"written {len(paths)} contact sheets")
    if not opened.particle.has_views:
        return paths
    ids = list(opened.ids)
    cameras = inspection(opened, FRAMES)
    if len(ids) <= SINGLE_TURNTABLES:
        named = [(f"particle-{i:06d}.mp4", [i]) for i in ids]
    else:
        named = _pages(ids, MOSAIC_PARTICLES, "turntable", "mp4")
    for name, chosen in named:
        images = _images(opened, chosen, cameras)
        frames = images[0] if len(chosen) == 1 else mosaic(images)
        paths.append(turntable(frames, run_dir, f"{RunPaths(run_dir).renders.name}/{name}"))
        report(f"written {name}")
    return paths


def contact_sheets(opened: Opened, run_dir: Path, folder: str = "") -> list[Path]:
    """`contact-sheet.png`, or numbered ones where the particles do not fit on one: a row a particle, 8 views each.

    Written into `folder`, a path below the run's directory, its renders unless given. Raises RunError where they cannot
    be.
    """
    ids = list(opened.ids)
    folder = folder or RunPaths(run_dir).renders.name
    cameras = inspection(opened)
    num_views = cameras.shape[1]
    paths = []
    for name, chosen in _pages(ids, SHEET_CELLS if num_views == 1 else SHEET_ROWS, "contact-sheet", "png"):
        images = _images(opened, chosen, cameras)
        labels = [f"{i}  {opened.config.prompts[i]}" for i in chosen] if num_views > 1 else None
        paths.append(save_png(contact_sheet(images, labels), run_dir, f"{folder}/{name}"))
    return paths


def _pages(ids: list[int], page: int, stem: str, suffix: str) -> list[tuple[str, list[int]]]:
    """File names with the particles of each, `page` on one; numbered where one does not hold all."""
    pages = [ids[first : first + page] for first in range(0, len(ids), page)]
    if len(pages) == 1:
        return [(f"{stem}.{suffix}", pages[0])]
    return [(f"{stem}-{number:03d}.{suffix}", chosen) for number, chosen in enumerate(pages)]


def _images(opened: Opened, ids: list[int], cameras: Cameras) -> Tensor:
    """Images `[P, V, 3, H, W]` of the particles from the same cameras `[1, V]`."""
    parts = groups(opened, ids, cameras.shape[1])
    return torch.cat([render_group(opened, group, cameras)[0] for group in parts])
