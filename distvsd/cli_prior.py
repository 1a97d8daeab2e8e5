"""The part of the command line under `distvsd prior`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distvsd import commands
from distvsd.arguments import (
    GUIDANCE,
    IMAGES,
    LEARNING_RATE,
    SAMPLES,
    SEED,
    STEPS,
    command_parser,
    json_argument,
    text,
)


def prior_commands(parents: Any) -> None:
    """Adds them to what `add_subparsers` of the program gave."""
    prior = parents.add_parser(
        "prior",
        help="describe a prior, draw from it, or train the embedded one",
        epilog="example: distvsd prior info shapes",
        allow_abbrev=False,
    )
    kinds = prior.add_subparsers(metavar="COMMAND", required=True)

    info = command_parser(
        kinds, "info", "describe a prior's folder", "shapes --measure", commands.run_prior_info, parent="prior "
    )
    info.add_argument(
        "path", nargs="?", default="shapes", metavar="PATH", help="a diffusers folder (default: %(default)s)"
    )
    info.add_argument(
        "--measure", action="store_true", help="draw samples and measure how right they are; takes minutes"
    )
    json_argument(info)

    sample = command_parser(
        kinds,
        "sample",
        "draw ancestral samples into one image",
        "'a red cube' --out cubes.png",
        commands.run_prior_sample,
        parent="prior ",
    )
    sample.add_argument("prompt", type=text, metavar="PROMPT", help="any text, also an empty one")
    sample.add_argument("--path", default="shapes", help="a diffusers folder (default: %(default)s)")
    sample.add_argument("--count", type=SAMPLES, default=16, help="number of samples (default: %(default)s)")
    sample.add_argument(
        "--guidance-scale",
        type=GUIDANCE,
        default=3.0,
        help="classifier-free guidance (default: %(default)s)",
    )
    sample.add_argument("--steps", type=STEPS, default=50, help="denoising steps (default: %(default)s)")
    sample.add_argument("--seed", type=SEED, default=0, help="of the initial noise (default: %(default)s)")
    sample.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="where the image goes")

    _build_command(kinds)


def _build_command(kinds: Any) -> None:
    build = command_parser(
        kinds,
        "build",
        "train the embedded prior from nothing; call again to go on",
        "runs/shapes",
        commands.run_prior_build,
        parent="prior ",
    )
    build.add_argument("folder", type=Path, metavar="FOLDER", help="where the pipeline is written")
    build.add_argument("--seed", type=SEED, default=0, help="of the data and the training (default: %(default)s)")
    build.add_argument(
        "--num-images",
        type=IMAGES,
        default=30_000,
        help="size of the drawn data set (default: %(default)s)",
    )
    build.add_argument("--steps", type=STEPS, default=12_000, help="training steps (default: %(default)s)")
    build.add_argument(
        "--learning-rate",
        type=LEARNING_RATE,
        default=8e-4,
        help="highest rate of the training (default: %(default)s)",
    )
    build.add_argument("--from", dest="start", default="", metavar="FOLDER", help="begin with this pipeline's weights")
    build.add_argument("--batch-size", type=SAMPLES, default=32, help="images a step (default: %(default)s)")
    build.add_argument("--device", default="cpu", help="torch device to train on (default: %(default)s)")
