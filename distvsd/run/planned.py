"""The plan of a run: one for each stage, made with a particle of the stage's kind that holds no values."""

from __future__ import annotations

from typing import Any

from distvsd.config import Config
from distvsd.plan.cluster import Assumptions
from distvsd.plan.plan import make_plan
from distvsd.plan.prior import prior_sizes
from distvsd.run.parts import blank_particle, make_objective
from distvsd.stages import stages_of


def plan_run(
    config: Config,
    nodes: int = 1,
    gpus_per_node: int = 1,
    assumed: Assumptions | None = None,
    published: str | None = None,
) -> dict[str, Any]:
    """`plan.plan.make_plan` of the run. For a run with stages `{"stages": [...]}`: a plan with its `name` for each.

    published: plans for the public model of that name (`plan.published.PUBLISHED`) instead of prior.path.
    """
    plans = []
    for stage in stages_of(config):
        sizes = prior_sizes(stage.config, published)
        latents = sizes.latent_shape(stage.config.final_resolution)
        is_known = latents is not None or not stage.config.are_latents
        particle = blank_particle(stage.config, latents) if is_known else None
        needs = make_objective(stage.config).needs
        plans.append(make_plan(stage.config, particle, sizes, needs, nodes, gpus_per_node, assumed))
    if not config.stages:
        return plans[0]
    return {"stages": [{"name": stage.name} | plan for stage, plan in zip(config.stages, plans, strict=True)]}
