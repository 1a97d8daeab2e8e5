"""The plan of a run: one for each stage, made with a particle of the stage's kind that holds no values."""

from __future__ import annotations

import json
from statistics import median
from typing import Any

from distvsd.config import Config, digest, load_config
from distvsd.errors import DistvsdError
from distvsd.plan.cluster import Assumptions
from distvsd.plan.floor import Ceilings
from distvsd.plan.plan import make_plan
from distvsd.plan.prior import prior_sizes
from distvsd.run.parts import blank_particle, make_objective
from distvsd.runtime import inside
from distvsd.runtime.paths import RunPaths
from distvsd.stages import stages_of


def plan_run(
    config: Config,
    nodes: int = 1,
    gpus_per_node: int = 1,
    assumed: Assumptions | None = None,
    published: str | None = None,
    ceilings: Ceilings | None = None,
) -> dict[str, Any]:
    """`plan.plan.make_plan` of the run. For a run with stages `{"stages": [...]}`: a plan with its `name` for each.

    published: plans for the public model of that name (`plan.published.PUBLISHED`) instead of prior.path.
    ceilings: of a rank's device, for the least time of a round; where `run.dir` holds rounds of the same configuration,
    they are compared with it.
    """
    plans = []
    for stage in stages_of(config):
        sizes = prior_sizes(stage.config, published)
        latents = sizes.latent_shape(stage.config.final_resolution)
        is_known = latents is not None or not stage.config.are_latents
        particle = blank_particle(stage.config, latents) if is_known else None
        needs = make_objective(stage.config).needs
        measured = measured_rounds(stage.paths, stage.config) if ceilings is not None and published is None else None
        plans.append(make_plan(stage.config, particle, sizes, needs, nodes, gpus_per_node, assumed, ceilings, measured))
    if not config.stages:
        return plans[0]
    return {"stages": [{"name": stage.name} | plan for stage, plan in zip(config.stages, plans, strict=True)]}


def measured_rounds(paths: RunPaths, config: Config) -> dict[int, dict[str, float]]:
    """Median seconds of each phase of the loop on the first rank, by resolution, from the metrics of a run.

    Empty where the directory holds no run, one of another configuration, or one that cannot be read. The first line is
    left out where there are others: its rounds include the warm-up of the process.
    """
    try:
        if paths.previous_config() is None or digest(load_config(paths.config)) != digest(config):
            return {}
        lines = (inside.read(paths.root, paths.metrics.name) or b"").splitlines()
        records = [json.loads(line) for line in lines]
        found: dict[int, list[dict[str, float]]] = {}
        for record in records[1:] or records:
            found.setdefault(int(record["resolution"]), []).append(record["phase_s"])
        return {resolution: _medians(seconds) for resolution, seconds in found.items()}
    except (DistvsdError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    phases = dict.fromkeys(phase for row in rows for phase in row)
    return {phase: median(float(row.get(phase, 0.0)) for row in rows) for phase in phases}
