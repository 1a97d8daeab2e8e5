"""What each of the three stages does to particles of one prompt, with the embedded prior.

    python -m benchmarks.stages --out runs/stages [--particles 16] [--ranks 2] [--page FILE] [key=value]

Trains `configs/quickstart-mesh.yaml`, or continues it, and reads each stage: the labels of the classifier, the faces,
and for prompts of a cube how far the surface is from one. --pictures writes the contact sheets there.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import machine
from distvsd.looking.evaluate import evaluate_run
from distvsd.looking.opened import Opened, load_particles
from distvsd.particles import Parameters

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart-mesh.yaml"


def angle_to_axes(normals: Tensor, areas: Tensor) -> float:
    """Mean angle in degrees between unit normals `[M, 3]` and the nearest of three orthogonal axes, weighted by the
    areas `[M]`, for the axes that fit best. 0 for a cube, about 31 for a ball.

    The axes are found by alternating between the nearest axis of each normal and the rotation that fits them
    (Procrustes), from nine directions around the vertical.
    """
    best = math.inf
    for turn in torch.linspace(0, math.pi / 2, 10)[:-1]:
        cos, sin = float(turn.cos()), float(turn.sin())
        rotation = torch.tensor([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
        for _ in range(30):
            along = normals @ rotation
            axis = along.abs().argmax(1, keepdim=True)
            target = torch.zeros_like(normals).scatter(1, axis, along.gather(1, axis).sign())
            left, _, right = torch.linalg.svd((normals * areas[:, None]).T @ target)
            rotation = left @ torch.diag(torch.tensor([1.0, 1.0, float(torch.linalg.det(left @ right))])) @ right
        angles = (normals @ rotation).abs().amax(1).clamp(max=1).acos()
        best = min(best, math.degrees(float((angles * areas).sum() / areas.sum())))
    return best


@torch.no_grad()
def angles(opened: Opened, resolution: int, threshold: float) -> list[float]:
    """`angle_to_axes` of each particle's surface; NaN where it has none."""
    found = []
    for particle_id in opened.ids:
        own: Parameters = {name: value[None] for name, value in opened.ensemble.parameters_of(particle_id).items()}
        surface = opened.particle.surface(own, resolution, threshold)
        normals = surface.meshes.area_normals if surface else torch.zeros(0, 3)
        areas = normals.norm(dim=1)
        solid = areas > 1e-9
        unit = normals[solid] / areas[solid][:, None]
        found.append(angle_to_axes(unit, areas[solid]) if solid.any() else math.nan)
    return found


def row(name: str, folder: Path) -> dict[str, Any]:
    """The figures of one stage."""
    result, opened = evaluate_run(folder), load_particles(folder)
    mesh = opened.config.particles.mesh
    faces = [detail["labels"].get("face") == "face" for detail in result["particles_detail"]]
    return {
        "stage": name,
        "views": result["view_accuracy"],
        "faces": sum(faces),
        "angle": sum(angles(opened, mesh.grid, mesh.threshold)) / len(opened.ids),
        "lost": result["empty"] + result["diverged"],
    }


def page(arguments: argparse.Namespace, rows: list[dict[str, Any]], seconds: float) -> str:
    """The results page."""
    lines = "\n".join(
        f"| {row['stage']} | {row['views'].get('color', math.nan):.1%} | {row['views'].get('shape', math.nan):.1%} "
        f"| {row['faces']} of {arguments.particles} | {row['angle']:.1f} | {row['lost']} |"
        for row in rows
    )
    return f"""# What the three stages do

{machine()}

    python -m benchmarks.stages --out DIR --particles {arguments.particles} --ranks {arguments.ranks} --page \
benchmarks/stages.md {" ".join(arguments.overrides)}

`configs/quickstart-mesh.yaml`, {arguments.particles} particles. This call trained for {seconds:.0f} s. The classifier \
labels eight views of each particle. Lost: empty or diverged. Angle: mean over the surface between its normal and \
the nearest of three orthogonal axes common to a particle, in degrees; 0 for a cube, about 31 for a ball. Of the field \
it is that of the isosurface which the geometry stage begins with.

| after stage | views with the right colour | with the right shape | particles with a face | angle | lost |
|---|---:|---:|---:|---:|---:|
{lines}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="run directory")
    parser.add_argument("--particles", type=int, default=16)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--pictures", type=Path, help="folder for the contact sheets")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks)]
    settings = [f"run.dir={args.out}", f"particles.count={args.particles}", *args.overrides]
    command = [sys.executable, *launcher, "-m", "distvsd.train", str(CONFIG), *settings]
    threads = max(len(os.sched_getaffinity(0)) // args.ranks, 1)
    start = time.monotonic()
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    seconds = time.monotonic() - start
    folders = sorted((args.out / "stages").iterdir())
    text = page(args, [row(folder.name, folder) for folder in folders], seconds)
    print(text)
    if args.pictures:
        for folder in folders:
            shutil.copy(folder / "renders" / "contact-sheet.png", args.pictures / f"stage-{folder.name}.png")
    if args.page:
        args.page.write_text(text, encoding="ascii")


if __name__ == "__main__":
    main()
