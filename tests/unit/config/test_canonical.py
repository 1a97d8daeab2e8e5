"""The canonical form: a written configuration reads back equal, and the digest covers what changes the mathematics."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import types
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distvsd.config import (
    Config,
    Schedule,
    StageConfig,
    config_from,
    diff,
    digest,
    document,
    load_config,
    to_dict,
    to_yaml,
)
from distvsd.config import values as values_module
from distvsd.config.ranges import Increasing, Range
from distvsd.errors import ConfigError

LIMITS = ("MAX_TEXT", "MAX_PROMPTS", "MAX_PROMPT_CHARACTERS", "MAX_POINTS")
TEXTS = st.text(max_size=40)


def values(annotation: Any) -> st.SearchStrategy[Any]:
    """Legal values of a field, from its annotation."""
    marks: list[Any] = []
    if get_origin(annotation) is Annotated:
        annotation, *marks = get_args(annotation)
    allowed = next((mark for mark in marks if isinstance(mark, Range)), Range())
    numbers = st.floats(max(allowed.low, -1e6), min(allowed.high, 1e6), allow_nan=False).filter(allowed.holds)
    if allowed.multiple_of:
        numbers = st.integers(math.ceil(allowed.low / 8), int(allowed.high / 8)).map(lambda n: float(n * 8))
    if dataclasses.is_dataclass(annotation) and annotation is not Schedule:
        return sections(annotation)
    if annotation is Schedule:
        later = st.lists(st.tuples(st.integers(1, 10**6), numbers), max_size=3, unique_by=lambda point: point[0])
        return st.builds(
            lambda first, rest, kind: Schedule(((0, first), *sorted(rest)), kind if rest else "step"),
            numbers,
            later,
            st.sampled_from(["step", "linear"]),
        )
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    if annotation == tuple[StageConfig, ...]:
        return st.lists(stages(), max_size=3).map(tuple)
    if get_origin(annotation) is tuple:
        increasing = any(isinstance(mark, Increasing) for mark in marks)
        return st.tuples(numbers, numbers).map(lambda pair: tuple(sorted(pair)) if increasing else pair)
    if get_origin(annotation) in (Union, types.UnionType) and int in get_args(annotation):
        return st.just("auto") | st.integers(int(allowed.low), int(allowed.high))
    if get_origin(annotation) in (Union, types.UnionType) or annotation is str:
        return TEXTS if not marks else st.text(min_size=1, max_size=40).filter(lambda text: "\0" not in text)
    if annotation is bool:
        return st.booleans()
    return st.integers(int(max(allowed.low, -(2**63))), int(min(allowed.high, 2**63))) if annotation is int else numbers


def sections(section: Any) -> st.SearchStrategy[Any]:
    hints = get_type_hints(section, include_extras=True)
    return st.builds(section, **{name: values(annotation) for name, annotation in hints.items()})


@st.composite
def stages(draw: st.DrawFn) -> StageConfig:
    """A stage that sets some of the fields whose legal values depend on no other field, in the order of the schema."""
    choices: dict[str, st.SearchStrategy[Any]] = {
        "prior.guidance_scale": st.floats(0, 1000),
        "prior.negative_prompt": TEXTS,
        "objective.esd_lambda": st.floats(0, 1),
        "particles.learning_rate": values(Annotated[Schedule, Range(0, 10)]),
        "particles.nerf.bound": st.floats(0.5, 10),
        "particles.health.max_bad": st.integers(1, 9),
        "cameras.distance": st.sampled_from([(1.0, 2.5), (0.25, 3.0)]),
        "schedule.rounds": st.integers(1, 100),
    }
    chosen = [key for key in choices if draw(st.booleans())]
    name = draw(st.from_regex("[a-z0-9][a-z0-9_-]{0,39}", fullmatch=True).filter(str.isascii))
    return StageConfig(name, tuple((key, draw(choices[key])) for key in chosen))


ANY_CONFIG = sections(Config)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Legal configurations: free fields from their annotations, related fields brought into agreement."""
    config: Config = draw(ANY_CONFIG)
    nerf = config.particles.nerf
    low, high = sorted((nerf.base_resolution, nerf.max_resolution))
    nerf = replace(nerf, base_resolution=low, max_resolution=max(low, high))
    gaussians = config.particles.gaussians
    least, first = min(gaussians.min_opacity, 0.005), max(gaussians.init_opacity, 0.01)
    any_strategy = config.parallel.numerics == "fast" and config.objective.kind != "sds"
    count = draw(st.integers(1, 4))
    cameras = config.cameras
    bound = min(cameras.adaptive.bound, nerf.bound, 0.5)
    cameras = replace(
        cameras,
        kind="orbit" if config.particles.kind == "image" else cameras.kind,
        distance=(max(cameras.distance[0], 0.1), max(cameras.distance[1], 0.1)),
        adaptive=replace(cameras.adaptive, bound=bound, clearance=min(cameras.adaptive.clearance, bound)),
    )
    prompt = draw(TEXTS | st.lists(TEXTS, min_size=count, max_size=count).filter(lambda texts: count > 1).map(tuple))
    return replace(
        config,
        prompt=prompt,
        prior=replace(config.prior, view_dependent=config.prior.view_dependent and cameras.kind == "orbit"),
        cameras=cameras,
        objective=replace(config.objective, t_min=Schedule.constant(0), t_max=config.objective.t_max),
        particles=replace(
            config.particles,
            count=count,
            views=2 * min(config.particles.views, 500),
            host=config.particles.host if 0 < config.particles.resident < count else 0,
            nerf=nerf,
            gaussians=replace(gaussians, min_opacity=least, init_opacity=first),
            image=replace(config.particles.image, space="pixel"),
        ),
        score=replace(
            config.score,
            replay_rounds=max(config.score.replay_rounds, 1),
            replay_share=config.score.replay_share / 2,
            micro_batch=config.score.micro_batch if config.parallel.strategy == "flat" else 0,
        ),
        render=replace(config.render, backend="auto", splat_backend="auto", grid_backend="auto"),
        parallel=config.parallel if any_strategy else replace(config.parallel, strategy="flat"),
        log=replace(config.log, wandb="off"),
    )


@given(configs())
@settings(max_examples=30, deadline=None)
def test_every_configuration_reads_back_from_its_yaml_and_from_a_manifest(config: Config) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(to_yaml(config), encoding="utf-8")
        again = load_config(path)
    assert again == config
    assert config_from(json.loads(json.dumps(to_dict(config))), "the manifest") == config
    assert digest(again) == digest(config)
    assert diff(config, again) == []


@pytest.mark.parametrize("ending", ["\n", "\r", "\x0b", "\x85", "\u2028", "\u2029", "\ufeff"])
@pytest.mark.parametrize("text", ["a{}b", "a{}", "{}b", "a: {}- b", "a\n{}\n"])
def test_texts_with_any_line_ending_read_back_the_same(tmp_path: Path, text: str, ending: str) -> None:
    config = replace(Config(), prompt=text.format(ending))
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path) == config


@pytest.mark.parametrize(
    "character", ["\0", "\x1b", "\x7f", "\x9b", "\u200b", "\u202e", "\u2066", "\ufeff", "\U000e0001"]
)
def test_what_a_terminal_would_not_show_is_written_as_an_escape(tmp_path: Path, character: str) -> None:
    config = replace(Config(), prompt=f"caf\u00e9{character}", log=replace(Config().log, wandb_name=f"{character}a"))
    text = to_yaml(config)
    assert all(line.isprintable() for line in text.split("\n"))
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    assert load_config(path) == config


def test_the_largest_configuration_that_is_accepted_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of the characters that take most bytes in YAML, and the longest lists and schedules. All limits are a
    twentieth of the real ones, to save time."""
    for module, names in ((document, ("MAX_BYTES", "MAX_VALUES")), (values_module, LIMITS)):
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name) // 20)
    text = "\U000e0001" * values_module.MAX_TEXT
    count = values_module.MAX_PROMPTS
    long = Schedule(tuple((10**9 - round, 8.0) for round in range(1, values_module.MAX_POINTS))[::-1])
    long = Schedule(((0, 8.0), *long.points))
    rate = Schedule(tuple((round, 0.1 + 1e-17 * round) for round, _ in long.points))
    config = replace(
        Config(),
        run=replace(Config().run, dir=text),
        prompt=("\U000e0001" * (values_module.MAX_PROMPT_CHARACTERS // count),) * count,
        prior=replace(Config().prior, path=text, negative_prompt=text),
        objective=replace(Config().objective, t_min=rate, t_max=rate),
        particles=replace(Config().particles, count=count, learning_rate=rate, network_learning_rate=rate),
        render=replace(Config().render, resolution=long),
        log=replace(Config().log, wandb_name=text, wandb_group=text, wandb_project=text),
    )
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path) == config


def test_pairs_and_whole_numbers_are_written_as_people_do() -> None:
    text = to_yaml(Config())
    assert "  elevation: [-10, 45]\n" in text
    assert "  resolution: 64\n" in text


@pytest.mark.parametrize(
    "override",
    [
        "run.dir=elsewhere",
        "log.every=3",
        "checkpoint.every=1",
        "checkpoint.keep=9",
        "parallel.timeout_s=5",
        "particles.recompute=true",
    ],
)
def test_the_digest_leaves_out_what_only_keeps_and_reports(tmp_path: Path, override: str) -> None:
    assert digest(changed(tmp_path, override)) == digest(Config())


@pytest.mark.parametrize(
    "override",
    [
        "run.seed=1",
        "prompt=another",
        "particles.count=9",
        "particles.nerf.levels=15",
        "objective.t_max={0: 0.98, 10: 0.5}",
        "parallel.numerics=exact",
        "score.replay_share=0.1",
        "schedule.rounds=2",
    ],
)
def test_the_digest_sees_what_changes_the_mathematics(tmp_path: Path, override: str) -> None:
    assert digest(changed(tmp_path, override)) != digest(Config())


def test_the_digest_takes_1_and_1_0_for_the_same_number() -> None:
    whole = replace(Config(), cameras=replace(Config().cameras, distance=(1, 1.5)))
    assert digest(whole) == digest(Config())


def test_the_difference_names_each_field_with_both_values(tmp_path: Path) -> None:
    other = changed(tmp_path, "score.rank=8", "render.resolution={0: 64, 10: 128}", "prompt=a cube")
    assert diff(Config(), other) == [
        ("prompt", "an object", "a cube"),
        ("render.resolution", 64, {0: 64, 10: 128}),
        ("score.rank", 4, 8),
    ]


def test_plain_data_holds_only_what_json_and_yaml_have() -> None:
    def types_in(value: Any) -> set[type]:
        if isinstance(value, dict):
            return set().union(*(types_in(item) for item in value.values()))
        return set().union(*(types_in(item) for item in value)) if isinstance(value, list) else {type(value)}

    assert types_in(to_dict(Config())) <= {str, int, float, bool}


def changed(tmp_path: Path, *overrides: str) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text("prompt: an object\n")
    return load_config(path, overrides)


@pytest.mark.parametrize(
    ("plain", "words"),
    [
        ({"particles": {"count": True}}, r"the manifest: particles\.count is the truth value true"),
        ({"objective": {"t_max": {"0": 0.9, "later": 0.5}}}, r"objective\.t_max has a point at the text 'later'"),
        ({"seed": 3}, "unknown key seed"),
        ({"run": [1]}, "run is a list of 1, but it is a section"),
        ({"render": {"resolution": {"0": 64, "5": {"0": 64}}}}, r"render\.resolution at round 5 is a mapping"),
    ],
)
def test_plain_data_that_is_no_configuration_is_refused_with_its_key(plain: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config_from(plain, "the manifest")
