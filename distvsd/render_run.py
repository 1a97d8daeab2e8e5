"""`distvsd render`: contact sheets and turntables of the particles of a run, from its newest checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from distvsd.cameras import Cameras
from distvsd.evaluate.views import Restored, groups, render_group, ring
from distvsd.export.images import contact_sheet, mosaic, save_png, turntable

FRAMES = 36
SINGLE_TURNTABLES = 16  # more particles than that share one picture
MOSAIC_PARTICLES = 64  # of the first particles
SHEET_CELLS = 4096  # of one contact sheet; more particles continue on the next
SHEET_ROWS = 64


def render_run(run_dir: Path, report: Callable[[str], None] = lambda text: None) -> list[Path]:
    """Writes RUN/renders and returns the paths: contact sheets of all particles, then turntables (not of images).

    Up to 16 particles have a turntable each, `particle-000003.mp4`; more share `turntable.mp4`.
    Raises what loading raises: RunError for a folder that is no run, CheckpointError where none can be read.
    """
    from distvsd.restored import load_particles  # the builder imports this package's rooms, so it is looked up late

    return render_particles(load_particles(run_dir), run_dir / "renders", report)


def render_particles(restored: Restored, folder: Path, report: Callable[[str], None] = lambda text: None) -> list[Path]:
    """Writes contact sheets and turntables of these particles into `folder`; see `render_run`."""
    paths = contact_sheets(restored, folder)
    report(f"written {len(paths)} contact sheets")
    if restored.config.particles.kind == "image":
        return paths
    ids = list(restored.ids)
    cameras = ring(restored.config, FRAMES)
    if len(ids) > SINGLE_TURNTABLES:
        frames = mosaic(_images(restored, ids[:MOSAIC_PARTICLES], cameras))
        return [*paths, turntable(frames, folder / "turntable.mp4")]
    for i in ids:
        paths.append(turntable(_images(restored, [i], cameras)[0], folder / f"particle-{i:06d}.mp4"))
        report(f"written {paths[-1].name}")
    return paths


def contact_sheets(restored: Restored, folder: Path) -> list[Path]:
    """`contact-sheet.png`, or numbered ones where the particles do not fit on one: a row a particle, 8 views each."""
    ids = list(restored.ids)
    cameras = ring(restored.config)
    num_views = cameras.shape[1]
    page = SHEET_CELLS if num_views == 1 else SHEET_ROWS
    pages = [ids[first : first + page] for first in range(0, len(ids), page)]
    paths = []
    for number, chosen in enumerate(pages):
        images = _images(restored, chosen, cameras)
        labels = [f"{i}  {restored.config.prompts[i]}" for i in chosen] if num_views > 1 else None
        name = "contact-sheet.png" if len(pages) == 1 else f"contact-sheet-{number:03d}.png"
        paths.append(save_png(contact_sheet(images, labels), folder / name))
    return paths


def _images(restored: Restored, ids: list[int], cameras: Cameras) -> Tensor:
    """Images `[P, V, 3, H, W]` of the particles from the same cameras `[1, V]`."""
    parts = groups(restored.config, ids, cameras.shape[1])
    return torch.cat([render_group(restored, group, cameras)[0] for group in parts])
