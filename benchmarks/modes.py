"""Do image particles of one prompt spread over the prior's modes? VSD against SDS, single runs and ancestral samples.

    python -m benchmarks.modes --out runs/modes [--particles 256] [--rounds 200] [--arms ancestral,sds,vsd,independent]

The prompt is "an object", which has 30 equally likely modes (six colours, five shapes). Every arm makes the same number
of images. `independent` trains one particle per run, each with its own score network and the same number of rounds. So
it has as many particle updates and as many samples for the score as `vsd`; the score of `vsd` takes four steps per
round.

The arms run one after the other. Each is saved when it ends, and a second call runs only the missing ones. Prints one
JSON object per arm; --page also writes the results page.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.machine import machine
from distvsd.config import load_config
from distvsd.looking import diversity
from distvsd.looking.images import contact_sheet, save_png
from distvsd.looking.opened import load_particles
from distvsd.looking.views import inspection, render_group
from distvsd.prior.load import load_prior
from distvsd.run.train import train
from distvsd.shapes.classifier import SCENES, Classifier, load_classifier

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
PROMPT = "an object"
REFERENCE = 1024  # ancestral samples that estimate the prior's distribution
STEPS, SAMPLES_A_CALL = 30, 64
SCORE_STEPS = 4


def trained(out: Path, kind: str, count: int, rounds: int, seed: int, overrides: list[str]) -> Tensor:
    """Images `[count, 3, H, W]` of one training of `count` image particles."""
    steps = SCORE_STEPS if count >= SCORE_STEPS else 1
    settings = [
        f"run.dir={out}",
        f"run.seed={seed}",
        f"prompt={PROMPT}",
        f"objective.kind={kind}",
        "particles.kind=image",
        f"particles.count={count}",
        f"schedule.rounds={rounds}",
        "checkpoint.every=0",
        f"log.every={max(rounds // 10, 1)}",
        # The same schedule for every number of rounds: high noise levels first, low ones last.
        f"objective.t_min={{0: 0.5, {rounds * 2 // 5}: 0.2, {rounds * 7 // 10}: 0.02}}",
        f"objective.t_max={{0: 0.98, {rounds * 2 // 5}: 0.9, {rounds * 7 // 10}: 0.5}}",
        # Latents, because Adam moves all numbers equally far and all latents have about the same variance. In pixels
        # the variation inside a patch is much smaller, so Adam's steps are too large for it and it stays noise.
        "particles.image.space=latent",
        f"particles.learning_rate={{linear: {{0: 0.04, {rounds}: 0.003}}}}",
        "particles.image.init_scale=0.1",
        # Particles with the same initial colour overshoot together, and their colours oscillate.
        "particles.image.init_color=0.1",
        "score.init=kaiming",
        "score.learning_rate=3e-3",
        # The steps share the round's renders, so all of them together cost as much as one step on all renders.
        f"score.steps_per_round={steps}",
        f"score.batch_size={-(-count // steps)}",
        *overrides,
    ]
    config = load_config(QUICKSTART, settings)
    train(config)
    opened = load_particles(out)
    return render_group(opened, opened.ids, inspection(opened))[0][:, 0].clamp(0, 1)


def counted(images: Tensor, classifier: Classifier) -> tuple[Tensor, float]:
    """How many images show each of the 30 modes, int64 `[30]`, and the share of images that show an object."""
    predictions = classifier.classify(images)
    is_object = predictions.scene == SCENES.index("object")
    found = [
        {"color": int(color), "shape": int(shape)} if ok else {}
        for ok, color, shape in zip(is_object, predictions.color, predictions.shape, strict=True)
    ]
    return diversity.mode_counts(found), float(is_object.float().mean())


def measure(images: Tensor, reference: Tensor) -> dict[str, Any]:
    """The figures of one arm. reference: `[30]` mode counts of many ancestral samples."""
    classifier = load_classifier()
    counts, objects = counted(images, classifier)
    return {
        "images": len(images),
        "objects": round(objects, 4),
        "modes_present": int((counts > 0).sum()),
        "total_variation_from_prior": round(diversity.total_variation(counts, reference), 4),
        "total_variation_from_uniform": round(diversity.total_variation(counts), 4),
        "vendi": round(diversity.vendi_score(classifier.embed(images)), 2),
    }


def page(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    """The results page."""
    table = "\n".join(
        f"| {row['arm']} | {row['modes_present']} | {row['total_variation_from_prior']:.3f} | "
        f"{row['total_variation_from_uniform']:.3f} | {row['vendi']:.1f} | {row['objects']:.1%} | {row['seconds']} |"
        for row in rows
    )
    settings = " ".join(arguments.overrides)
    return f"""# Do image particles spread over the prior's modes?

{machine()}

    python -m benchmarks.modes --out DIR --particles {arguments.particles} --rounds {arguments.rounds} \
--guidance-scale {arguments.guidance_scale} --page benchmarks/modes.md {settings}

{arguments.particles} image particles of "{PROMPT}", {arguments.rounds} rounds, guidance {arguments.guidance_scale}, \
in the prior's latents. The classifier counts colours and shapes: 30 modes. `ancestral` is {arguments.particles} fresh \
samples of the prior itself. The distance to the prior is measured to {REFERENCE} other samples of the prior, so the \
`ancestral` row shows the distance that chance alone gives. `independent` is {arguments.particles} trainings of one \
particle, each with its own score network and {arguments.rounds} rounds. So `vsd` and `independent` have the same \
number of particle updates and of training samples. The shared score network trains on a round's renders in \
{SCORE_STEPS} steps; a network of one particle trains on its one render in one step.

| images by | modes of 30 | total variation from the prior's samples | from uniform | Vendi score | objects | s |
|---|---:|---:|---:|---:|---:|---:|
{table}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--particles", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--arms", default="ancestral,sds,vsd,independent")
    parser.add_argument("--page", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    overrides = [f"prior.guidance_scale={args.guidance_scale}", *args.overrides]

    def ancestral(count: int, seed: int) -> Tensor:
        prior = load_prior("shapes", [PROMPT], view_dependent=False)
        parts = range(0, count, SAMPLES_A_CALL)
        images = [prior.sample([PROMPT], SAMPLES_A_CALL, args.guidance_scale, STEPS, seed + first) for first in parts]
        return torch.cat(images)[:count]

    def together(kind: str) -> Callable[[], Tensor]:
        return lambda: trained(args.out / kind, kind, args.particles, args.rounds, 0, overrides)

    def independent() -> Tensor:
        runs = (args.out / "independent" / f"{seed:04d}" for seed in range(args.particles))
        return torch.cat([trained(run, "vsd", 1, args.rounds, seed, overrides) for seed, run in enumerate(runs)])

    arms: dict[str, Callable[[], Tensor]] = {
        "reference": lambda: ancestral(REFERENCE, 1_000_000),
        "ancestral": lambda: ancestral(args.particles, 0),
        "sds": together("sds"),
        "vsd": together("vsd"),
        "independent": independent,
    }

    def images_of(arm: str) -> Tensor:
        """The images of an arm, from its file if there is one. Otherwise makes them and saves them with the seconds."""
        file = args.out / f"{arm}.safetensors"
        if not file.exists():
            start = time.monotonic()
            made = arms[arm]()
            save_file({"images": made.contiguous(), "seconds": torch.tensor(time.monotonic() - start)}, file)
            side = int(len(made) ** 0.5)
            sheet = contact_sheet(made[: side * side].reshape(side, side, *made.shape[1:]))
            save_png(sheet, args.out, f"{arm}.png")
        images: Tensor = load_file(file)["images"]
        return images

    args.out.mkdir(parents=True, exist_ok=True)
    reference, _ = counted(images_of("reference"), load_classifier())
    rows = []
    for arm in args.arms.split(","):
        row = {"arm": arm} | measure(images_of(arm), reference)
        row["seconds"] = round(float(load_file(args.out / f"{arm}.safetensors")["seconds"]))
        rows.append(row)
        print(json.dumps(row), flush=True)
    if args.page:
        args.page.write_text(page(args, rows), encoding="ascii")


if __name__ == "__main__":
    main()
