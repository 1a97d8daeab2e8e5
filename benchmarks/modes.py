"""Do image particles of one prompt spread over the prior's modes? VSD against SDS, single runs and ancestral samples.

    python benchmarks/modes.py --out runs/modes [--particles 256] [--rounds 200] [--arms ancestral,sds,vsd,independent]

The prompt is "an object", which has 30 equally likely modes (six colours, five shapes). Every arm gives as many images;
`independent` trains one particle a run with a score network of its own, each for as many rounds, so that the particle
updates and the score's samples are as many as in `vsd`. Arms run one after the other; each is saved when it ends, and a
second call goes on with what is missing. Prints one JSON object an arm.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distvsd.build import load_particles
from distvsd.config import load_config
from distvsd.evaluate import diversity
from distvsd.evaluate.views import render_group, ring
from distvsd.export.images import contact_sheet, save_png
from distvsd.prior.load import load_prior
from distvsd.prior.shapes.classifier import SCENES, load_classifier
from distvsd.train import train

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
PROMPT = "an object"


def trained(out: Path, kind: str, count: int, rounds: int, seed: int, overrides: list[str]) -> Tensor:
    """Images `[count, 3, H, W]` of one training of `count` image particles."""
    settings = [
        f"run.dir={out}",
        f"run.seed={seed}",
        f"prompt={PROMPT}",
        "prior.view_dependent=false",
        f"objective.kind={kind}",
        "particles.kind=image",
        f"particles.count={count}",
        f"schedule.rounds={rounds}",
        "checkpoint.every=0",
        f"log.every={max(rounds // 10, 1)}",
        *overrides,
    ]
    config = load_config(QUICKSTART, settings)
    train(config)
    restored = load_particles(out)
    return render_group(restored, restored.ids, ring(config))[0][:, 0].clamp(0, 1)


def measure(images: Tensor) -> dict[str, object]:
    """Modes present, total variation from uniform over the 30 modes, share that is an object at all, Vendi score."""
    classifier = load_classifier()
    predictions = classifier.classify(images)
    is_object = predictions.scene == SCENES.index("object")
    found = [
        {"scene": SCENES.index("object"), "color": int(color), "shape": int(shape)} if ok else {}
        for ok, color, shape in zip(is_object, predictions.color, predictions.shape, strict=True)
    ]
    counts = diversity.mode_counts(found)
    return {
        "images": len(images),
        "objects": round(float(is_object.float().mean()), 4),
        "modes_present": int((counts > 0).sum()),
        "total_variation_from_uniform": round(diversity.total_variation(counts), 4),
        "vendi": round(diversity.vendi_score(classifier.embed(images)), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--particles", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--arms", default="ancestral,sds,vsd,independent")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    overrides = [f"prior.guidance_scale={args.guidance_scale}", *args.overrides]

    def ancestral() -> Tensor:
        prior = load_prior("shapes", [PROMPT], view_dependent=False)
        return prior.sample([PROMPT], args.particles, args.guidance_scale, 30, seed=0)

    def together(kind: str) -> Callable[[], Tensor]:
        return lambda: trained(args.out / kind, kind, args.particles, args.rounds, 0, overrides)

    def independent() -> Tensor:
        runs = (args.out / "independent" / f"{seed:04d}" for seed in range(args.particles))
        return torch.cat([trained(run, "vsd", 1, args.rounds, seed, overrides) for seed, run in enumerate(runs)])

    arms = {"ancestral": ancestral, "sds": together("sds"), "vsd": together("vsd"), "independent": independent}
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.arms.split(","):
        file = args.out / f"{name}.safetensors"
        start = time.monotonic()
        if not file.exists():
            save_file({"images": arms[name]().contiguous()}, file)
        images = load_file(file)["images"]
        side = int(len(images) ** 0.5)
        save_png(contact_sheet(images[: side * side].reshape(side, side, *images.shape[1:])), args.out / f"{name}.png")
        print(json.dumps({"arm": name, "seconds": round(time.monotonic() - start)} | measure(images)), flush=True)


if __name__ == "__main__":
    main()
