"""What fields must fulfil together; each relation is checked only if its fields are right by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from distvsd.config.schedule import Schedule
from distvsd.config.schema import Config
from distvsd.errors import ConfigError

# The most addends of `numerics: exact` without overflow; a test compares it with `parallel.reduce.MAX_ADDENDS`.
MOST_EXACT_ROWS = 2**13 - 1


@dataclass(frozen=True)
class Relation:
    """keys: the dotted fields involved; a mistake is reported at the first. broken: says what is wrong, or None."""

    keys: tuple[str, ...]
    broken: Callable[[Config], str | None]


def _prompt_count(config: Config) -> str | None:
    if isinstance(config.prompt, str) or len(config.prompt) == config.particles.count:
        return None
    count = config.particles.count
    return f"has {len(config.prompt)} entries but particles.count is {count}; give one prompt or exactly {count}"


def _time_range(config: Config) -> str | None:
    low, high = config.objective.t_min, config.objective.t_max
    for round in _corners(low, high):
        least, most = low.at(round), high.at(round)
        if least > most:
            return f"is {least:g} at round {round} but objective.t_max is {most:g} there; allowed: at most t_max"
    return None


def _corners(*schedules: Schedule) -> Iterator[int]:
    """Rounds at which a difference of piecewise linear or constant functions takes its extremes."""
    starts = {point[0] for schedule in schedules for point in schedule.points}
    return iter(sorted(starts | {start - 1 for start in starts if start}))


def _grid_resolutions(config: Config) -> str | None:
    nerf = config.particles.nerf
    if nerf.base_resolution <= nerf.max_resolution:
        return None
    return (
        f"is {nerf.base_resolution} but particles.nerf.max_resolution is {nerf.max_resolution}; allowed: at most that"
    )


def _replay(config: Config) -> str | None:
    if config.score.replay_share == 0 or config.score.replay_rounds > 0:
        return None
    return (
        f"is {config.score.replay_share:g} but score.replay_rounds is 0; keep at least 1 round, or set the share to 0"
    )


def _resident(config: Config) -> str | None:
    if config.particles.host == 0 or config.particles.turns > 1:
        return None
    return (
        f"is {config.particles.host}, but all {config.particles.count} particles are on the devices all of the time; "
        "set particles.resident to fewer than particles.count, or host to 0"
    )


def _latent_size(config: Config) -> str | None:
    if not config.are_latents or len(config.render.resolution.points) == 1:
        return None
    return "changes with the round, but latent images have one size; give one number, or particles.image.space: pixel"


def _exact_backend(config: Config) -> str | None:
    if config.parallel.numerics != "exact" or config.render.backend != "nerfacc":
        return None
    return "is nerfacc, whose sums change from run to run, but parallel.numerics is exact; allowed: auto, torch"


def _exact_grid(config: Config) -> str | None:
    backend = config.render.grid_backend
    if config.parallel.numerics != "exact" or backend in ("auto", "torch"):
        return None
    return f"is {backend}, whose sums change from run to run, but parallel.numerics is exact; allowed: auto, torch"


def _exact_splats(config: Config) -> str | None:
    if config.parallel.numerics != "exact" or config.render.splat_backend != "gsplat":
        return None
    return "is gsplat, whose sums change from run to run, but parallel.numerics is exact; allowed: auto, torch"


def _first_opacity(config: Config) -> str | None:
    gaussians = config.particles.gaussians
    if gaussians.min_opacity < gaussians.init_opacity:
        return None
    return (
        f"is {gaussians.min_opacity:g} but particles.gaussians.init_opacity is {gaussians.init_opacity:g}, so that "
        "all gaussians would begin dead; allowed: below that"
    )


def _exact_strategy(config: Config) -> str | None:
    if config.parallel.strategy == "flat" or config.parallel.numerics != "exact":
        return None
    strategy = config.parallel.strategy
    return f"is {strategy}, whose sums change with the ranks, but parallel.numerics is exact; allowed: flat"


def _strategy_without_score(config: Config) -> str | None:
    if config.parallel.strategy == "flat" or config.objective.needs_score:
        return None
    return f"is {config.parallel.strategy}, but objective.kind is sds, which trains no score network; allowed: flat"


def _exact_rows(config: Config) -> str | None:
    rows = config.score.rows_a_step(config.particles.active, config.particles.views)
    if config.parallel.numerics != "exact" or not config.objective.needs_score or rows <= MOST_EXACT_ROWS:
        return None
    return (
        f"is exact, which adds at most {MOST_EXACT_ROWS} samples a score step, but count, views, batch_size and "
        f"replay_share make it {rows}; allowed: fast, or fewer"
    )


def _micro_batch(config: Config) -> str | None:
    # The libraries' backward pass is one call, and every rank must take part in a call of a split network.
    if config.score.micro_batch in (0, "auto") or config.parallel.strategy == "flat":
        return None
    return (
        f"is {config.score.micro_batch}, but parallel.strategy is {config.parallel.strategy}, which makes one call on "
        "every rank; allowed: 0, auto, or the strategy flat"
    )


def _pairs_of_views(config: Config) -> str | None:
    if not config.cameras.antithetic or config.particles.views % 2 == 0:
        return None
    return f"is true, but particles.views is {config.particles.views}; allowed: an even number of views"


def _named_views(config: Config) -> str | None:
    if config.cameras.kind == "orbit" or not config.prior.view_dependent or not config.has_views:
        return None
    return (
        f"is {config.cameras.kind}, but prior.view_dependent is true, and inside a scene nothing is a front or a back; "
        "set prior.view_dependent=false"
    )


def _orbit_distance(config: Config) -> str | None:
    if config.cameras.kind != "orbit" or config.cameras.distance[0] > 0:
        return None
    return "begins at 0, but cameras.kind is orbit; allowed: above 0"


def _space_of_cameras(config: Config) -> str | None:
    bound, nerf = config.cameras.adaptive.bound, config.particles.nerf.bound
    if config.cameras.kind != "adaptive" or config.particles.kind != "nerf" or bound <= nerf:
        return None
    return f"is {bound:g} but particles.nerf.bound is {nerf:g}, outside which there is nothing; allowed: at most that"


def _clearance(config: Config) -> str | None:
    adaptive = config.cameras.adaptive
    if adaptive.clearance <= adaptive.bound:
        return None
    return f"is {adaptive.clearance:g} but cameras.adaptive.bound is {adaptive.bound:g}; allowed: at most that"


def _volume(config: Config) -> str | None:
    if config.cameras.kind != "adaptive" or config.particles.kind != "image":
        return None
    return "is adaptive, which reads the density of particles, but particles.kind is image; allowed: orbit"


RELATIONS = (
    Relation(("prompt", "particles.count"), _prompt_count),
    Relation(("objective.t_min", "objective.t_max"), _time_range),
    Relation(("particles.nerf.base_resolution", "particles.nerf.max_resolution"), _grid_resolutions),
    Relation(("score.replay_share", "score.replay_rounds"), _replay),
    Relation(("render.resolution", "particles.kind", "particles.image.space"), _latent_size),
    Relation(("render.backend", "parallel.numerics"), _exact_backend),
    Relation(("render.grid_backend", "parallel.numerics"), _exact_grid),
    Relation(("render.splat_backend", "parallel.numerics"), _exact_splats),
    Relation(("particles.gaussians.min_opacity", "particles.gaussians.init_opacity"), _first_opacity),
    Relation(("parallel.strategy", "parallel.numerics"), _exact_strategy),
    Relation(("parallel.strategy", "objective.kind"), _strategy_without_score),
    Relation(
        (
            "parallel.numerics",
            "objective.kind",
            "particles.count",
            "particles.resident",
            "particles.views",
            "score.replay_share",
            "score.batch_size",
        ),
        _exact_rows,
    ),
    Relation(("particles.host", "particles.resident", "particles.count"), _resident),
    Relation(("score.micro_batch", "parallel.strategy"), _micro_batch),
    Relation(("cameras.antithetic", "particles.views"), _pairs_of_views),
    Relation(("cameras.kind", "prior.view_dependent", "particles.kind"), _named_views),
    Relation(("cameras.distance", "cameras.kind"), _orbit_distance),
    Relation(("cameras.adaptive.bound", "cameras.kind", "particles.kind", "particles.nerf.bound"), _space_of_cameras),
    Relation(("cameras.adaptive.clearance", "cameras.adaptive.bound"), _clearance),
    Relation(("cameras.kind", "particles.kind"), _volume),
)


def refuse_small_latents(config: Config, native: int) -> None:
    """Raises ConfigError where the UNet would see less than a quarter of the edge it was trained at, in pixels."""
    edge = min(config.encoded_edge(resolution, native) for resolution in config.render.corners(config.schedule.rounds))
    if 4 * edge >= native or config.render.small_latents:
        return
    raise ConfigError(
        f"the UNet of {config.prior.path} was trained on images of {native} pixels a side, but would see latents of "
        f"{edge} pixels a side, too small for it; set render.encode_resolution=native, a render.resolution "
        f"of at least {-(-native // 32) * 8}, or render.small_latents=true if this is what you want"
    )
