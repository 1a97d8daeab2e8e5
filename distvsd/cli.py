"""The command line. Every command imports the packages it needs when it runs, so that help is fast.

Exit codes: 0 done; 2 wrong usage, configuration or prior; 3 preempted, resumable; 130 interrupted from the keyboard (a
command other than train, or a second time); 141 done, but the output was not read to its end; 1 anything else.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from distvsd import commands
from distvsd.arguments import (
    ASSUMPTION,
    DENSITY,
    GRID,
    NODES,
    PARTICLES,
    RANKS_A_NODE,
    TEXTURE,
    command_parser,
    json_argument,
)
from distvsd.cli_prior import prior_commands
from distvsd.commands import is_first_rank
from distvsd.config.scalars import printable
from distvsd.errors import ConfigError, DistvsdError, UsageError
from distvsd.plan.published import PUBLISHED
from distvsd.runtime import streams
from distvsd.runtime.launcher import watch_from_the_start
from distvsd.runtime.preempt import leave_by_signal, obey_from_the_start

Command = Callable[[argparse.Namespace], int]
FIRST_RANK_S = 3.0
INTERRUPTED = 130  # as in shells: 128 plus the number of SIGINT

INTRODUCTION = """\
distvsd makes 3-D scenes from text by Variational Score Distillation, with many particles on many ranks.

  distvsd train configs/quickstart.yaml    the first run: no GPU and no download, minutes on two CPU cores
  distvsd render runs/quickstart           its turntables and contact sheet
  distvsd plan configs/prolificdreamer.yaml --as sd-2.1 --gpus-per-node 8    what a large run needs
  distvsd doctor                           what is installed here, and what is missing
  distvsd --help                           all commands; distvsd COMMAND --help explains one"""

# Options that change what `distvsd plan` assumes: option, unit, meaning.
PLAN_ASSUMPTIONS = (
    ("--round-s", "S", "assumed seconds a round"),
    ("--disk-mb-s", "MB", "assumed megabytes a second of the shared disk, all ranks together"),
    ("--restart-s", "S", "assumed seconds from the end of a job to the loading of its checkpoint"),
    ("--node-mtbf-days", "DAYS", "assumed mean time between failures of one node"),
)


def program(argv: Sequence[str] | None = None) -> NoReturn:
    """`main` as a process of its own, which ends with its exit code; a crash leaves a traceback of every thread."""
    output = streams.guard()
    if (sys.argv[1:] if argv is None else argv)[:1] == ["train"]:
        obey_from_the_start()
        watch_from_the_start()
    faulthandler.enable()
    try:
        code = main(argv)
    except SystemExit as ended:  # argparse, which has printed why
        code = ended.code if isinstance(ended.code, int) else 1
    except KeyboardInterrupt:
        print("distvsd: interrupted", file=sys.stderr, flush=True)
        code = INTERRUPTED
    code = streams.exit_code(code, output)
    leave_by_signal()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        if code == ConfigError.exit_code and not is_first_rank():
            # A launcher ends all ranks when one has ended, and only the first rank prints the error: the others wait.
            time.sleep(FIRST_RANK_S)
        # gloo's threads may free the last tensors while the interpreter shuts down. That aborts the process (seen with
        # torch 2.13), and a finished run would count as failed.
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; argparse itself exits with 2 on wrong usage.

    An error this program raises on purpose is one paragraph on standard error; any other keeps its traceback.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest:
        # argparse takes positionals only up to the first option; those after it are overrides too.
        if not hasattr(args, "overrides") or any(text.startswith("-") for text in rest):
            args.parser.error(f"unrecognized arguments: {printable(' '.join(rest), 300)}")
        args.overrides = [*args.overrides, *rest]
    command: Command = args.command
    try:
        return command(args)
    except DistvsdError as error:
        _report(error)
        return error.exit_code


def train_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `distvsd train`, for anything that starts training."""
    _config_arguments(parser)
    parser.add_argument(
        "--resume",
        choices=("auto", "must", "never"),
        default="auto",
        help="auto: go on where run.dir is, or begin; must: only go on, also with a changed configuration; "
        "never: only begin (default: %(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration as YAML and stop")
    parser.add_argument("--help-config", action=_HelpConfig, help="print every configuration field and stop")


class _HelpConfig(argparse.Action):
    """Like --help: acts without the positional arguments."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from distvsd.config.reference import print_reference

        sys.stdout.write(print_reference())
        parser.exit(0)


def _introduce(args: argparse.Namespace) -> int:
    print(INTRODUCTION)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distvsd",
        description="Variational Score Distillation with many particles on many ranks.",
        epilog="exit codes: 0 done, 2 wrong usage or configuration, 3 preempted and resumable, 141 done but the\n"
        "output was not read to its end, 1 anything else\n"
        "example: distvsd train configs/quickstart.yaml particles.count=4",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(command=_introduce, parser=parser)
    kinds = parser.add_subparsers(metavar="COMMAND")

    train = command_parser(
        kinds,
        "train",
        "train the particles of a configuration",
        "configs/quickstart.yaml run.dir=runs/a",
        commands.run_train,
    )
    train_arguments(train)

    _plan_command(kinds)
    _commands_on_runs(kinds)
    prior_commands(kinds)
    command_parser(
        kinds, "doctor", "list versions, devices and what is missing, each with what to do", "", commands.run_doctor
    )
    return parser


def _plan_command(kinds: Any) -> None:
    plan = command_parser(
        kinds,
        "plan",
        "say what a run needs, without a GPU: who owns what, memory, bytes, UNet calls, schedules",
        "configs/prolificdreamer.yaml particles.count=64 --as sd-2.1 --nodes 4 --gpus-per-node 8",
        commands.run_plan,
    )
    _config_arguments(plan)
    plan.add_argument("--nodes", type=NODES, default=1, metavar="N", help="number of machines (default: %(default)s)")
    plan.add_argument(
        "--gpus-per-node",
        type=RANKS_A_NODE,
        default=1,
        metavar="G",
        help="ranks a machine (default: %(default)s)",
    )
    plan.add_argument(
        "--as",
        dest="published",
        choices=tuple(PUBLISHED),
        help="plan for a public model by its published sizes instead of prior.path; needs no weights",
    )
    for option, metavar, what in PLAN_ASSUMPTIONS:
        plan.add_argument(
            option,
            type=ASSUMPTION,
            metavar=metavar,
            help=f"{what} (default: the one that the plan prints)",
        )
    plan.add_argument(
        "--gflops",
        type=ASSUMPTION,
        metavar="N",
        help="10^9 operations a second of a rank's device in large matrix "
        "products (default: measured here, in half a second)",
    )
    plan.add_argument(
        "--gbps",
        type=ASSUMPTION,
        metavar="N",
        help="10^9 bytes a second of a rank's device, read and written in large "
        "copies (default: measured here, in half a second)",
    )
    json_argument(plan)


def _commands_on_runs(kinds: Any) -> None:
    evaluate = command_parser(
        kinds, "evaluate", "measure what the particles of a run are worth", "runs/a --json", commands.run_evaluate
    )
    _run_argument(evaluate)
    json_argument(evaluate)

    render = command_parser(
        kinds, "render", "write turntables and contact sheets of a run", "runs/a", commands.run_render
    )
    _run_argument(render)

    _export_command(kinds)

    verify = command_parser(
        kinds, "verify", "check every checkpoint file against its manifest", "runs/a --digest", commands.run_verify
    )
    _run_argument(verify)
    verify.add_argument(
        "--digest", action="store_true", help="print one SHA-256 a component, the whole last, and no path"
    )

    log = command_parser(
        kinds,
        "log",
        "send a run's metrics and pictures to Weights and Biases",
        "runs/a --wandb online",
        commands.run_log,
    )
    _run_argument(log)
    log.add_argument(
        "--wandb", choices=("offline", "online"), default="offline", help="where to (default: %(default)s)"
    )
    log.add_argument(
        "--results-only", action="store_true", help="only the last pictures, the particles and evaluation.json"
    )


def _export_command(kinds: Any) -> None:
    export = command_parser(
        kinds,
        "export",
        "write the particles of a run as files for other programs",
        "runs/a --format glb --particles 0,3",
        commands.run_export,
    )
    _run_argument(export)
    export.add_argument(
        "--format", choices=("glb", "obj", "ply"), default="glb", help="of the files (default: %(default)s)"
    )
    export.add_argument("--particles", type=PARTICLES, metavar="IDS", help="such as 0,3,7 (default: all)")
    export.add_argument(
        "--texture",
        type=TEXTURE,
        default=1024,
        metavar="N",
        help="edge of the baked texture of glb and obj, 0 for colours of vertices (default: %(default)s)",
    )
    export.add_argument(
        "--resolution",
        type=GRID,
        default=48,
        metavar="N",
        help="cubes along an edge of the lattice on which the surface of a field is found (default: %(default)s)",
    )
    export.add_argument(
        "--threshold",
        type=DENSITY,
        metavar="D",
        help="density per world unit at which that surface lies (default: particles.mesh.threshold of the run)",
    )
    json_argument(export)


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML file; every field has a default")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="fields to set last, such as particles.count=4"
    )


def _run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, as run.dir names it")


def _report(error: DistvsdError) -> None:
    """Prints an error. One of configuration or usage is the same on every rank, so only the first rank prints it;
    another error names its rank."""
    if isinstance(error, ConfigError | UsageError) and not is_first_rank():
        return
    rank = "" if is_first_rank() else f" on rank {os.environ['RANK']}"
    lines = "\n".join(printable(line) for line in str(error).split("\n"))
    print(f"distvsd: error{rank}: {lines}", file=sys.stderr, flush=True)
