"""Label accuracy of 3-D VSD on the embedded prior. The classifier counts over prompts, particles and views.

    python -m benchmarks.prompts --out runs/prompts [--prompts 10] [--particles 8] [--seed 0] [--ranks 2] [key=value]

The seed draws the prompts from the 30 combinations of colour and shape, so they are not chosen by hand. All particles
train in one run, with one score network for all prompts. Prints the results page; --page also writes it to a file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from distvsd.looking.evaluate import evaluate_run
from distvsd.shapes.captions import article
from distvsd.shapes.world import COLORS, SHAPES

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def draw_prompts(count: int, seed: int) -> list[str]:
    """`count` different prompts. The counts of any two colours, and of any two shapes, differ by at most one."""
    rng = random.Random(seed)
    every = [(color, shape) for color in COLORS for shape in SHAPES]
    chosen: list[tuple[str, str]] = []
    while len(chosen) < count:
        rest = [pair for pair in every if pair not in chosen]
        used = {name: sum(name in pair for pair in chosen) for name in (*COLORS, *SHAPES)}
        rng.shuffle(rest)
        chosen.append(min(rest, key=lambda pair: used[pair[0]] + used[pair[1]]))
    return [f"{article(color)} {shape}" for color, shape in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="run directory")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--particles", type=int, default=8, help="particles per prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--page", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    prompts = draw_prompts(args.prompts, args.seed)
    each = [prompt for prompt in prompts for _ in range(args.particles)]
    overrides = [
        f"run.dir={args.out}",
        f"run.seed={args.seed}",
        f"prompt={json.dumps(each)}",
        f"particles.count={len(each)}",
        *args.overrides,
    ]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks)]
    command = [sys.executable, *launcher, "-m", "distvsd.train", str(QUICKSTART), *overrides]
    threads = max(len(os.sched_getaffinity(0)) // args.ranks, 1)
    start = time.monotonic()
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    text = page(args, prompts, evaluate_run(args.out), time.monotonic() - start)
    print(text)
    if args.page:
        args.page.write_text(text, encoding="ascii")


def page(arguments: argparse.Namespace, prompts: list[str], result: dict[str, Any], seconds: float) -> str:
    """The results page."""
    rows = []
    for prompt in prompts:
        mine = [detail for detail in result["particles_detail"] if detail["prompt"] == prompt]
        color, shape = (sum(d["view_accuracy"][head] for d in mine) / len(mine) for head in ("color", "shape"))
        labels = Counter(f"{d['labels'].get('color', '?')} {d['labels'].get('shape', '?')}" for d in mine)
        read = ", ".join(f"{count} {label}" for label, count in labels.most_common())
        rows.append(f"| {prompt} | {color:.1%} | {shape:.1%} | {read} |")
    table = "\n".join(rows)
    every = result["view_accuracy"]
    return f"""# Do particles show what their prompt says, from every side?

{machine()}

    python -m benchmarks.prompts --out DIR --prompts {arguments.prompts} --particles {arguments.particles} --seed \
{arguments.seed} --ranks {arguments.ranks} --page benchmarks/prompts.md {" ".join(arguments.overrides)}

`configs/quickstart.yaml`, {result["particles"]} radiance fields in one run with one score network. This call trained \
for {seconds:.0f} s. The seed draws the prompts. The classifier labels {result["views"]} views of each particle, from \
all sides. The colour is right in **{every["color"]:.1%}** of all views, the shape in **{every["shape"]:.1%}**. \
{result["empty"]} particles are empty, and {result["diverged"]} diverged.

| prompt | views with the right colour | with the right shape | particles by majority label |
|---|---:|---:|---|
{table}
"""


if __name__ == "__main__":
    main()
