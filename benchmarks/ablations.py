"""Every ablation of `configs/ablations` beside `configs/quickstart.yaml`, with the embedded prior: table and picture.

    python -m benchmarks.ablations --out runs/ablations [--only sds esd] [--particles 4] [--shorten 2] [--ranks 1]
    [--page FILE] [key=value]

Each is trained into a folder of its own, or continued there. All see the same seed and so the same first particles,
cameras and noise. An ablation of the number of particles keeps its own number. --shorten divides the rounds, and the
rounds of all schedules, by a number.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import machine
from distvsd.config import Config, load_config
from distvsd.looking.evaluate import evaluate_run
from distvsd.looking.images import contact_sheet, save_png
from distvsd.looking.opened import Opened, load_particles
from distvsd.looking.views import inspection, render_group

CONFIGS = Path(__file__).parents[1] / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"
CELLS, EDGE = 8, 64  # of a row of the picture


def shortened(config: Config, by: int) -> list[str]:
    """Overrides that divide the rounds of the run, and of its schedules, by a number."""
    schedules = {
        "objective.t_min": config.objective.t_min,
        "objective.t_max": config.objective.t_max,
        "particles.learning_rate": config.particles.learning_rate,
    }
    rounds = max(config.schedule.rounds // by, 1)
    settings = [f"schedule.rounds={rounds}", f"checkpoint.every={max(config.checkpoint.every // by, 1)}"]
    for key, schedule in schedules.items():
        points = ", ".join(f"{at // by}: {value}" for at, value in schedule.points)
        settings.append(f"{key}={{{schedule.kind}: {{{points}}}}}")
    return settings


def train(path: Path, folder: Path, particles: int, shorten: int, ranks: int, overrides: list[str]) -> None:
    """Trains one file, or continues it; nothing is done where it is finished."""
    config = load_config(path)
    usual = load_config(QUICKSTART).particles.count
    settings = [f"run.dir={folder}", *shortened(config, shorten)]
    if config.particles.count == usual:
        settings.append(f"particles.count={particles}")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launcher, "-m", "distvsd.train", str(path), *settings, *overrides]
    threads = max(len(os.sched_getaffinity(0)) // ranks, 1)
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})


def cells(opened: Opened) -> Tensor:
    """Images `[CELLS, 3, EDGE, EDGE]` of the first particles; several views of each where there are fewer of them."""
    chosen = list(opened.ids)[:CELLS]
    cameras = inspection(opened)
    views = torch.arange(CELLS // len(chosen)) * cameras.shape[1] // (CELLS // len(chosen))
    images = render_group(opened, chosen, cameras[:, views])[0].flatten(0, 1)
    small = torch.nn.functional.interpolate(images, EDGE, mode="area")
    return torch.cat((small, torch.ones(CELLS - len(small), 3, EDGE, EDGE)))


def purpose(path: Path) -> str:
    """The first line of the file, which says what it is for."""
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


def row(path: Path, folder: Path) -> dict[str, Any]:
    """The figures of one trained file."""
    result = evaluate_run(folder)
    return {
        "name": path.stem,
        "purpose": purpose(path),
        "views": result["view_accuracy"],
        "faces": sum(detail["labels"].get("face") == "face" for detail in result["particles_detail"]),
        "particles": result["particles"],
        "cosine": result.get("diversity", {}).get("mean_cosine", math.nan),
        "lost": result["empty"] + result["diverged"],
    }


def page(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    """The results page."""
    lines = "\n".join(
        f"| {row['name']} | {row['views'].get('color', math.nan):.1%} | {row['views'].get('shape', math.nan):.1%} "
        f"| {row['faces']} of {row['particles']} | {row['cosine']:.3f} | {row['lost']} | {row['purpose']} |"
        for row in rows
    )
    return f"""# What the parts of the method contribute

{machine()}

    python -m benchmarks.ablations --out DIR --particles {arguments.particles} --shorten {arguments.shorten} --ranks \
{arguments.ranks} --page benchmarks/ablations.md {" ".join(arguments.overrides)}

Each line is a file of `configs/ablations`, which changes one thing of `configs/quickstart.yaml`; the prompt is "a red \
cube". All rounds, and those of the schedules, are divided by {arguments.shorten}. The classifier labels eight views \
of each particle. Similarity: mean cosine between the classifier's features of two particles, 1 where all look alike. \
Lost: empty or diverged.

| configuration | views of right colour | of right shape | particles with a face | similarity | lost | what it is for |
|---|---:|---:|---:|---:|---:|---|
{lines}

![a row a configuration, each particle from the front, or from several sides where there are fewer than \
{CELLS}](ablations.png)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--only", nargs="+", help="names of ablations; all unless given")
    parser.add_argument("--particles", type=int, default=4)
    parser.add_argument("--shorten", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--page", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    every = {path.stem: path for path in sorted((CONFIGS / "ablations").glob("*.yaml"))}
    unknown = sorted(set(args.only or ()) - set(every))
    if unknown:
        parser.error(f"--only: no ablation is called {', '.join(unknown)}; there are {', '.join(every)}")
    paths = [QUICKSTART, *(path for name, path in every.items() if name in (args.only or every))]
    rows, pictures = [], []
    for path in paths:
        folder = args.out / path.stem
        train(path, folder, args.particles, args.shorten, args.ranks, args.overrides)
        rows.append(row(path, folder))
        pictures.append(cells(load_particles(folder)))
        print(rows[-1], flush=True)
    sheet = contact_sheet(torch.stack(pictures), [row["name"] for row in rows]).quantize(256)
    save_png(sheet, args.out, "ablations.png")
    text = page(args, rows)
    print(text)
    if args.page:
        args.page.write_text(text, encoding="ascii")
        save_png(sheet, args.page.parent, "ablations.png")


if __name__ == "__main__":
    main()
