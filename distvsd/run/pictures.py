"""Contact sheets while a stage trains and when it is done. A picture that cannot be drawn never ends a run."""

from __future__ import annotations

import logging
from typing import Any

from distvsd.errors import RunError
from distvsd.looking.opened import Opened, load_particles
from distvsd.looking.render import SHEET_ROWS, contact_sheets
from distvsd.run.build import Run
from distvsd.run.journal import Journal
from distvsd.runtime.paths import RunPaths

_log = logging.getLogger("distvsd")


def draw_round(parts: Run, paths: RunPaths, journal: Journal, completed: int) -> None:
    """Contact sheets after `completed` rounds: each rank draws its own first particles, so that nothing is gathered."""
    ensemble = parts.ensemble
    ids = ensemble.ids[:SHEET_ROWS]
    if not ids:
        return
    decode = parts.prior.decode if ensemble.particle.is_latent else None
    folder = f"{paths.renders.name}/round-{completed:08d}/particles-{ids[0]:06d}-{ids[-1]:06d}"
    try:
        sheets = contact_sheets(Opened(parts.config, ids, completed, ensemble, decode), paths.root, folder)
    except (RunError, OSError, RuntimeError) as error:  # a full disk, no memory
        _log.warning("no pictures of round %d: %s", completed, error)
    else:
        journal.pictures(sheets, completed)


def draw_finished(parts: Run, paths: RunPaths, journal: Journal) -> None:
    """The contact sheet and the table of the finished stage, on rank 0, from its newest checkpoint."""
    if parts.world.rank != 0:
        return
    try:
        _draw_finished(parts, paths, journal)
    except Exception as error:  # whatever it is: the state is saved, and the other ranks wait
        journal.progress.note(f"warning: no pictures of the finished run ({type(error).__name__}: {error})")


def _draw_finished(parts: Run, paths: RunPaths, journal: Journal) -> None:
    config = parts.config
    finished = load_particles(paths.root, str(parts.world.device), most=SHEET_ROWS, custom=parts.custom)
    sheets = contact_sheets(finished, paths.root)
    for sheet in sheets:
        journal.progress.note(f"written {sheet}")
    if len(finished.ids) < config.particles.count:
        journal.progress.note(
            f"which shows the first {SHEET_ROWS} of {config.particles.count} particles; `distvsd render {paths.root}` "
            "draws all"
        )
    journal.pictures(sheets, finished.step)
    rows: list[dict[str, Any]] = [
        {"particle": particle_id, "prompt": config.prompts[particle_id]} | health
        for particle_id, health in sorted(finished.health.items())
    ]
    journal.particles(rows, finished.step)
