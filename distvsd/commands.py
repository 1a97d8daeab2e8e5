"""What each command of the command line does with its parsed arguments; the exit code is what is returned."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distvsd.config.scalars import printable
from distvsd.errors import UsageError
from distvsd.parallel.launch import launched_rank


def run_train(args: argparse.Namespace) -> int:
    """Trains, or prints the resolved configuration. Under a launcher every rank calls it."""
    from distvsd.config import load_config, to_yaml

    config = load_config(args.config, args.overrides)
    if args.dry_run:
        if is_first_rank():
            sys.stdout.buffer.write(to_yaml(config).encode())  # UTF-8 whatever the terminal has: it is a file's content
        return 0
    from distvsd.run.train import train

    # Training prints no result: what libraries print goes to standard error, as the messages do.
    with contextlib.redirect_stdout(sys.stderr):
        return train(config, args.resume)


def run_plan(args: argparse.Namespace) -> int:
    from distvsd.config import load_config
    from distvsd.plan.cluster import Assumptions
    from distvsd.plan.text import draw
    from distvsd.run.planned import plan_run

    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Assumptions)}
    assumed = Assumptions(**{name: value for name, value in given.items() if value is not None})
    config = load_config(args.config, args.overrides)
    plan = plan_run(
        config, args.nodes, args.gpus_per_node, assumed, args.published, _ceilings(args, config.prior.dtype)
    )
    print(json.dumps(plan) if args.json else draw(plan))
    return 0


def _ceilings(args: argparse.Namespace, dtype: str) -> Any:
    """Of this machine, measured unless both are given."""
    from distvsd.plan.ceilings import measure_ceilings
    from distvsd.plan.floor import Ceilings

    if args.gflops is not None and args.gbps is not None:
        return Ceilings(args.gflops, args.gbps, "given")
    found = measure_ceilings(dtype)
    return Ceilings(args.gflops or found.gflops, args.gbps or found.gbps, found.what)


def run_evaluate(args: argparse.Namespace) -> int:
    run = _run_directory(args)
    with _only_json(args.json):
        from distvsd.looking.evaluate import evaluate_run
        from distvsd.stages import newest_stage

        result = evaluate_run(newest_stage(run))
    _print_result(result, args.json)
    return 0


def run_render(args: argparse.Namespace) -> int:
    run = _run_directory(args)
    from distvsd.looking.render import render_run
    from distvsd.stages import newest_stage

    for path in render_run(newest_stage(run)):
        print(path)
    return 0


def run_export(args: argparse.Namespace) -> int:
    run = _run_directory(args)
    with _only_json(args.json):
        from distvsd.looking.export import export_run
        from distvsd.stages import newest_stage

        done = export_run(
            newest_stage(run),
            args.format,
            args.particles,
            texture=args.texture,
            resolution=args.resolution,
            threshold=args.threshold,
            report=lambda text: print(text, file=sys.stderr, flush=True),
        )
    written = [str(path) for path in done.paths]
    if args.json:
        print(json.dumps({"written": written, "skipped": {str(i): why for i, why in done.skipped.items()}}))
        return 0
    print("\n".join(map(printable, written)))
    if done.skipped:
        reasons = "; ".join(f"particle {particle_id}: {why}" for particle_id, why in done.skipped.items())
        print(f"{len(done.skipped)} particles are not exported. {reasons}", file=sys.stderr, flush=True)
    return 0


def run_verify(args: argparse.Namespace) -> int:
    run = _run_directory(args)
    from distvsd.checkpoint import reader
    from distvsd.run.contents import verify
    from distvsd.runtime import inside
    from distvsd.runtime.paths import RunPaths
    from distvsd.stages import stage_folders

    folders = stage_folders(run) or [run]
    for folder in folders:
        inside.expect_folder(folder, RunPaths(folder).checkpoints.name)
    for line in verify(run, args.digest):
        print(line)
    for paths in map(RunPaths, folders):
        steps = reader.steps(paths.checkpoints)
        if steps and paths.previous_config() is not None:
            from distvsd.config import load_config
            from distvsd.looking.opened import compare_with_saved

            compare_with_saved(paths, load_config(paths.config), reader.open_checkpoint(paths.checkpoints, steps[0]))
    return 0


def run_log(args: argparse.Namespace) -> int:
    run = _run_directory(args)
    from distvsd.config import load_config, to_dict
    from distvsd.runtime.paths import RunPaths
    from distvsd.runtime.replay_metrics import replay
    from distvsd.stages import newest_stage

    run = newest_stage(run)
    config = load_config(RunPaths(run).known_config())
    log = config.log
    count = replay(
        run,
        args.wandb,
        log.wandb_project,
        log.wandb_name or run.resolve().name,
        log.wandb_group,
        to_dict(config),
        lambda text: print(text, file=sys.stderr, flush=True),
        args.results_only,
    )
    print(f"{count} notes sent")
    return 0


def run_prior_info(args: argparse.Namespace) -> int:
    with _only_json(args.json):
        from distvsd.looking.describe_prior import describe

        result = describe(args.path)
        if args.measure:
            from distvsd.looking.measure_prior import measure_prior

            result["measured"] = measure_prior(args.path, report=lambda line: print(line, file=sys.stderr, flush=True))
    _print_result(result, args.json)
    return 0


def run_prior_sample(args: argparse.Namespace) -> int:
    _refuse_unwritable(args.out)
    from distvsd.looking.describe_prior import sample

    sample(args.path, args.prompt, args.count, args.guidance_scale, args.steps, args.seed, args.out)
    print(args.out)
    return 0


def run_prior_build(args: argparse.Namespace) -> int:
    from distvsd.shapes.build import BuildConfig, build

    config = BuildConfig(
        seed=args.seed,
        num_images=args.num_images,
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        start=args.start,
    )
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{args.folder} cannot be a folder ({error.strerror}); give another one") from error
    build(args.folder, config, args.device, lambda line: print(line, flush=True))
    return 0


def run_doctor(args: argparse.Namespace) -> int:
    from distvsd.doctor import examine

    for line in examine():
        print(line)
    return 0


def _run_directory(args: argparse.Namespace) -> Path:
    run: Path = args.run
    try:
        is_there = run.is_dir()
    except OSError as error:  # a name that is too long, a folder on the path without permission
        raise UsageError(f"{run} cannot be looked at ({error.strerror}); give a run directory") from error
    if not is_there:
        raise UsageError(
            f"{run} is not a directory; give the run directory that training wrote (run.dir of its configuration)"
        )
    return run


def _refuse_unwritable(path: Path) -> None:
    """Raises UsageError, before anything is computed, where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        if not is_new and not path.is_file():
            raise UsageError(f"{path} is a directory, a pipe or a device; give the name of a file")
        path.open("ab").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}); give another file") from error


def _only_json(json_wanted: bool) -> contextlib.AbstractContextManager[object]:
    """Keeps standard output free for the object: meanwhile packages and libraries print to standard error."""
    return contextlib.redirect_stdout(sys.stderr) if json_wanted else contextlib.nullcontext()


def _print_result(result: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        if key == "particles_detail":
            print("\n".join(_particle_line(detail) for detail in value))
        else:
            print(f"{key}: {json.dumps(value) if isinstance(value, list | Mapping) else printable(str(value))}")


def _particle_line(detail: Mapping[str, Any]) -> str:
    """One particle's evaluation: its labels, then how many of its views are as the prompt asks."""
    found = " ".join(f"{head} {label}," for head, label in detail["labels"].items())
    views = " ".join(f"{head} {share:.0%}" for head, share in detail["view_accuracy"].items())
    states = "".join(f" {state.upper()}" for state in ("empty", "diverged") if detail[state])
    return f"particle {detail['id']} ({json.dumps(detail['prompt'])}): {found} as asked {views or '-'}{states}"


def is_first_rank() -> bool:
    """Whether this process reports for its launch. One that no launcher started does, whatever RANK is."""
    return not launched_rank(os.environ)
