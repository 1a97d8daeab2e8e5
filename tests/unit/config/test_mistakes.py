"""What is refused, and that the message helps: place, key, what is allowed, the nearest name."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from distvsd.config import document, load_config
from distvsd.errors import ConfigError

# (text, line of the mistake, what the message must contain besides the place)
BAD = [
    ("particle: {count: 3}", 1, ["unknown key particle;", "did you mean particles?"]),
    ("particles:\n  cuont: 3", 2, ["unknown key particles.cuont", "did you mean particles.count?"]),
    ("particles:\n  nerf:\n    leveles: 3", 3, ["particles.nerf.leveles", "did you mean particles.nerf.levels?"]),
    ("prompt: a\n\ncount: 3", 3, ["unknown key count", "did you mean particles.count?"]),
    ("score: {steps_per_round: 1}\nzzz: 1", 2, ["unknown key zzz", "known here: run, prompt, prior"]),
    ("1: 2", 1, ["unknown key 1"]),
    ("particles:\n  count: 0", 2, ["particles.count is 0", "at least 1"]),
    ("particles: {count: -4}", 1, ["particles.count is -4", "at least 1"]),
    ("particles: {count: 2.0}", 1, ["particles.count is 2.0", "an integer"]),
    ("particles: {count: true}", 1, ["particles.count is the truth value true", "an integer"]),
    ("particles: {count: '8'}", 1, ["particles.count is the text '8'", "an integer"]),
    ("particles: {count: }", 1, ["particles.count is nothing", "an integer"]),
    ("particles: {count: [8]}", 1, ["particles.count is a list", "an integer"]),
    ("particles: {count: 999999999999999999999}", 1, ["particles.count", "at most 2147483647"]),
    ("particles: {count: " + "9" * 5000 + "}", 1, ["particles.count", "5000 characters", "an integer"]),
    ("particles: {count: 0x" + "f" * 5000 + "}", 1, ["particles.count", "5002 characters", "an integer"]),
    ("schedule: {rounds: 1" + ":59" * 3000 + "}", 1, ["schedule.rounds", "9001 characters", "an integer"]),
    ("particles: {eps: 1" + ":59" * 3000 + ".5}", 1, ["particles.eps", "characters", "a number"]),
    ("particles: {views: " + "9" * 99 + "}", 1, ["particles.views", "9999...;", "at most 1000000000"]),
    ("objective: {t_max: {0: 0.9, " + "9" * 99 + ": 7}}", 1, ["objective.t_max at round 999", "...", "at most 1"]),
    ("score: {replay_share: 0.9999999999999999}", 1, ["score.replay_share", "at most 0.99"]),
    ("run: {seed: -1}", 1, ["run.seed is -1", "at least 0"]),
    ("run: {dir: ''}", 1, ["run.dir is empty", "at least one character"]),
    ("run: {dir: 7}", 1, ["run.dir is 7", "a text", "quotes"]),
    ("prompt: 12", 1, ["prompt is 12", "a text", "quotes"]),
    ("prompt: yes", 1, ["prompt is the truth value true", "quotes"]),
    ("prompt: 2026-11-23", 1, ["prompt is the date 2026-11-23", "quotes"]),
    ("prompt:", 1, ["prompt is nothing", '""']),
    ("prompt: {a: b}", 1, ["prompt is a mapping", "a text"]),
    ("prompt: !!bool maybe", 1, ["prompt is the text 'maybe'", "!!bool", "leave the tag out"]),
    ("prompt: !!timestamp x", 1, ["prompt is the text 'x'", "!!timestamp"]),
    ("run: {seed: !!int ''}", 1, ["run.seed is the text ''", "!!int", "an integer"]),
    ("run: {seed: !!int 0b_}", 1, ["run.seed is the text '0b_'", "!!int"]),
    ("? !!seq x\n: 1", 1, ["unknown key", "tag:yaml.org,2002:seq", "leave it out"]),
    ("? !!float y\n: 1", 1, ["unknown key the text 'y'", "!!float"]),
    ("prior: !!python/object:os {}", 1, ["prior is a value with the tag", "python/object:os", "leave it out"]),
    ("!!set {a}", 1, ["the tag tag:yaml.org,2002:set", "not a mapping"]),
    ("prompt: !<tag:%1b[31m> a", 1, ["prompt is a value with the tag tag:\\x1b[31m"]),
    ('prompt: "a \\ud83d b"', 1, ["prompt is the text 'a \\ud83d b'", "surrogate"]),
    ('prompt: a\nrun: {dir: "\\U00110000"}', 2, ["is not YAML", "U+10FFFF"]),
    ('prompt: "\\UFFFFFFFF"', 1, ["is not YAML", "U+10FFFF"]),
    ("%YAML 1." + "1" * 5000 + "\n---\nprompt: a", 1, ["is not YAML", "%YAML"]),
    ('run: {dir: "a\\0b"}', 1, ["run.dir is the text 'a\\x00b'", "NUL"]),
    ('prior: {path: "a\\0b"}', 1, ["prior.path is the text 'a\\x00b'", "NUL"]),
    ("prompt: " + "x" * 100_001, 1, ["prompt is a text of 100001 characters", "at most 100000"]),
    (
        "prompt: [" + "&a " + "x" * 50_000 + ", *a" * 1000 + "]",
        1,
        ["prompt has 50050000 characters", "at most 1000000"],
    ),
    ("objective: {t_max: {" + ", ".join(f"{i}: 0.9" for i in range(1001)) + "}}", 1, ["t_max has 1001 points", "1000"]),
    ("prompt: []", 1, ["prompt is an empty list", "one per particle"]),
    ("prompt: [a, 3]", 1, ["prompt entry 1", "is 3", "a text"]),
    ("particles: {count: 7}\nprompt: [a, b, c]", 2, ["prompt has 3 entries but particles.count is 7", "exactly 7"]),
    ("prior: {guidance_scale: .nan}", 1, ["prior.guidance_scale is not finite"]),
    ("prior: {guidance_scale: .inf}", 1, ["prior.guidance_scale is not finite"]),
    ("prior: {guidance_scale: strong}", 1, ["prior.guidance_scale is the text 'strong'", "a number"]),
    ("prior: {view_dependent: 1}", 1, ["prior.view_dependent is 1", "true, false"]),
    ("prior: {dtype: flaot16}", 1, ["prior.dtype", "float32, float16, bfloat16", "did you mean 'float16'?"]),
    ("objective: {kind: VSD}", 1, ["objective.kind is the text 'VSD'", "vsd, sds, esd"]),
    ("objective: {esd_lambda: 1.5}", 1, ["objective.esd_lambda is 1.5", "at most 1"]),
    ("objective:\n  t_min: 0.6\n  t_max: {0: 0.98, 100: 0.5}", 2, ["objective.t_min is 0.6 at round 100", "0.5"]),
    ("objective: {t_max: {100: 0.5}}", 1, ["objective.t_max begins at round 100", "round 0"]),
    ("objective: {t_max: {0: 0.9, x: 0.5}}", 1, ["objective.t_max", "'x'", "integers at least 0"]),
    ("objective: {t_max: {-1: 0.9}}", 1, ["objective.t_max", "-1", "integers at least 0"]),
    ("objective: {t_max: {0: 0.9, 5: 7}}", 1, ["objective.t_max at round 5 is 7", "at most 1"]),
    ("objective: {t_max: {}}", 1, ["objective.t_max is a mapping", "a schedule is a number"]),
    ("objective: {t_max: {cubic: {0: 1}}}", 1, ["objective.t_max", "'cubic'", "`linear`"]),
    ("particles: {betas: [0.9]}", 1, ["particles.betas is a list of 1", "two numbers"]),
    ("particles: {betas: [0.9, 1.0]}", 1, ["particles.betas is 1", "below 1"]),
    ("particles: {nerf: 3}", 1, ["particles.nerf is 3", "section", "particles.nerf.levels"]),
    ("particles:", 1, ["particles is nothing", "section", "delete the line"]),
    (
        "particles:\n  nerf: {base_resolution: 64, max_resolution: 32}",
        2,
        ["base_resolution is 64", "max_resolution is 32"],
    ),
    ("particles: {nerf: {bound: 0}}", 1, ["particles.nerf.bound is 0", "above 0"]),
    ("cameras:\n  elevation: [50, 20]", 2, ["cameras.elevation is [50, 20]", "must not be larger"]),
    ("cameras: {elevation: [0, 90]}", 1, ["cameras.elevation is 90", "below 90"]),
    ("cameras: {distance: 1.5}", 1, ["cameras.distance is 1.5", "two numbers"]),
    ("cameras: {distance: [0, 1.5]}", 1, ["cameras.distance begins at 0", "orbit", "above 0"]),
    ("cameras: {kind: inside}", 1, ["cameras.kind", "orbit, scene, adaptive"]),
    ("cameras:\n  antithetic: true\nparticles: {views: 3}", 2, ["cameras.antithetic", "views is 3", "even"]),
    ("prompt: a\ncameras: {kind: scene}", 2, ["cameras.kind is scene", "prior.view_dependent=false"]),
    (
        "prior: {view_dependent: false}\ncameras: {kind: adaptive, adaptive: {bound: 2}}",
        2,
        ["cameras.adaptive.bound is 2", "particles.nerf.bound is 1"],
    ),
    ("cameras: {adaptive: {clearance: 1.5}}", 1, ["cameras.adaptive.clearance is 1.5", "bound is 1"]),
    (
        "prior: {view_dependent: false}\ncameras: {kind: adaptive}\nparticles: {kind: image}",
        2,
        ["cameras.kind is adaptive", "particles.kind is image"],
    ),
    ("render: {resolution: 65}", 1, ["render.resolution is 65", "a multiple of 8"]),
    ("render: {resolution: 64.5}", 1, ["render.resolution is 64.5", "an integer"]),
    ("render: {resolution: {0: 64, 9: 100}}", 1, ["render.resolution at round 9 is 100", "a multiple of 8"]),
    ("score: {replay_share: 0.5, replay_rounds: 0}", 1, ["score.replay_share is 0.5 but score.replay_rounds is 0"]),
    ("score: {replay_share: 1}", 1, ["score.replay_share is 1", "at most 0.99"]),
    ("parallel: {strategy: hsdp}", 1, ["parallel.strategy", "flat, ddp, fsdp2, deepspeed"]),
    ("parallel: {zero_stage: 4}", 1, ["parallel.zero_stage is 4", "at most 3"]),
    (
        "particles: {count: 8192}\nparallel: {numerics: exact}",
        2,
        ["parallel.numerics is exact", "it 8192; allowed"],
    ),
    ("score: {micro_batch: 4}\nparallel: {strategy: ddp}", 1, ["score.micro_batch is 4", "is ddp", "allowed: 0"]),
    ("parallel: {strategy: fsdp2, numerics: exact}", 1, ["parallel.strategy is fsdp2", "exact; allowed: flat"]),
    ("particles: {count: 8, resident: 8, host: 2}", 1, ["particles.host is 2", "all 8 particles are on the devices"]),
    ("objective: {kind: sds}\nparallel: {strategy: ddp}", 2, ["parallel.strategy is ddp", "kind is sds"]),
    ("parallel: {numerics: exact}\nrender: {backend: nerfacc}", 2, ["render.backend is nerfacc", "exact", "torch"]),
    ("parallel: {numerics: exact}\nrender: {grid_backend: triton}", 2, ["grid_backend is triton", "exact", "torch"]),
    ("parallel: {numerics: exact}\nrender: {splat_backend: gsplat}", 2, ["splat_backend is gsplat", "exact", "torch"]),
    (
        "particles: {gaussians: {min_opacity: 0.2, init_opacity: 0.1}}",
        1,
        ["particles.gaussians.min_opacity is 0.2", "init_opacity is 0.1"],
    ),
    ("particles: {gaussians: {capacity: 0}}", 1, ["particles.gaussians.capacity is 0", "at least 1"]),
    (
        "particles: {kind: image, image: {space: latent}}\nrender: {resolution: {0: 64, 9: 128}}",
        2,
        ["render.resolution changes", "latent images"],
    ),
    ("log: {wandb: on}", 1, ["log.wandb", "off, offline, online"]),
    ("checkpoint: {keep: 1}", 1, ["checkpoint.keep is 1", "at least 2"]),
    ("particles: {health: {restore_rate: 0}}", 1, ["particles.health.restore_rate"]),
    ("run: {seed: 1}\nrun: {seed: 2}", 2, ["'run' is given twice", "run.yaml:1"]),
    ("run:\n  seed: 1\n  seed: 1", 3, ["'seed' is given twice", "run.yaml:2"]),
    ("prompt: a\nrun: {seed: !!python/name:os.system x}", 2, ["python/name:os.system", "leave it out"]),
    ("prompt: a\nscore: &a {rank: *a}", 2, ["alias", "write the value out"]),
    ("? [a]\n: 1", 1, ["a list cannot name a field"]),
    ("prompt: a\n<<: {run: 3}", 2, ["unknown key <<"]),
    ("prompt: [a", 1, ["is not YAML"]),
    ("prompt: a: b", 1, ["is not YAML", "quote"]),
    ("prompt: a\nrun: *nobody", 2, ["is not YAML", "nobody"]),
    ("prompt: a\n---\nprompt: b", 2, ["is not YAML"]),
    ("prompt: a\x00", 1, ["is not YAML", "character"]),
    ("- prompt: a", 1, ["a list, not a mapping"]),
    ("a red cube", 1, ["a single value, not a mapping"]),
]


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.mark.guarantee("G30")
@pytest.mark.parametrize(("text", "line", "hints"), BAD, ids=[text[:40] for text, _, _ in BAD])
def test_a_mistake_is_refused_with_its_place_and_what_to_do(
    tmp_path: Path, text: str, line: int, hints: list[str]
) -> None:
    """Wrong keys, types, ranges and combinations are refused with file, line and what is allowed."""
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    message = refusal(path)
    assert f"run.yaml:{line}" in message
    for hint in hints:
        assert hint in message


@pytest.mark.guarantee("G30")
@pytest.mark.parametrize(
    ("override", "hints"),
    [
        ("particles.count=0", ["particles.count is 0", "at least 1"]),
        ("particles.cuont=3", ["unknown key particles.cuont", "did you mean particles.count?"]),
        ("particel.count=3", ["unknown key particel", "did you mean particles?"]),
        ("particles.count", ["key.sub=value"]),
        ("=3", ["key.sub=value"]),
        ("particles..count=3", ["key.sub=value"]),
        ("prompt=[a", ["is not YAML"]),
        ("prompt=a: b", ["prompt is a mapping"]),
        ("particles=3", ["particles is 3", "section", "particles.kind"]),
        ("prompt.x=3", ["prompt is a mapping"]),
        ("schedule.rounds=", ["schedule.rounds is the text ''", "an integer"]),
        ("run.seed=1e3", ["run.seed is the text '1e3'", "an integer"]),
    ],
)
def test_a_wrong_override_is_named_as_it_was_written(tmp_path: Path, override: str, hints: list[str]) -> None:
    """A wrong override on the command line is refused as it was written."""
    path = tmp_path / "run.yaml"
    path.write_text("prompt: a\n")
    message = refusal(path, override)
    assert f"override {override}: " in message
    for hint in hints:
        assert hint in message


def test_an_override_with_a_very_long_text_does_not_flood_the_message(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("prompt: a\n")
    assert len(refusal(path, "prior.dtype=" + "x" * 10_000)) < 1000


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("particle: 1\nrun: {seed: -1}\nrender:\n  resolution: 63\nrender: {}\n")
    message = refusal(path, "score.rank=0", "nonsense")
    assert message.startswith("6 mistakes in the configuration")
    for place in (
        "run.yaml:1: ",
        "run.yaml:2: ",
        "run.yaml:4: ",
        "run.yaml:5: ",
        "score.rank=0: ",
        "override nonsense: ",
    ):
        assert place in message


def test_a_relation_is_not_reported_on_top_of_a_wrong_field(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("prompt: [a, b]\nparticles: {count: -1}\n")
    assert refusal(path).startswith("1 mistake in")


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    assert "nowhere.yaml does not exist" in refusal(tmp_path / "nowhere.yaml")


def test_a_directory_is_said_to_be_one(tmp_path: Path) -> None:
    assert "is a directory" in refusal(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_a_configuration_error(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.touch(mode=0)
    assert "cannot be read" in refusal(path)


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n"])
def test_an_empty_file_is_said_to_be_empty(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert "empty" in refusal(path) or "not a mapping" in refusal(path)


def test_bytes_that_are_not_utf8_are_refused_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"run: {seed: 1}\nprompt: caf\xe9\n")
    message = refusal(path)
    assert "run.yaml:2" in message
    assert "0xe9 is not UTF-8" in message


@pytest.mark.parametrize(
    "text",
    [
        "prompt: " + "[" * 33,
        "prompt: " + "[" * 330 + "a" + "]" * 330,
        "prompt: " + "[" * 100_000,
        "prompt: " + "{a: " * 400,
        "- " * 5000 + "a",
        "? " * 5000 + "a",
        "\n".join(" " * depth + "a:" for depth in range(400)),
    ],
    ids=lambda text: text[:20],
)
def test_deep_nesting_is_refused_with_the_limit(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert "nested too deeply; allowed: 32 levels" in refusal(path)
    if "\n" not in text:
        path.write_text("prompt: a")
        assert "nested too deeply; allowed: 32 levels" in refusal(path, f"prompt={text.removeprefix('prompt: ')}")


def test_more_values_than_a_configuration_can_need_are_refused_with_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document, "MAX_VALUES", document.MAX_VALUES // 20)  # to save time
    path = tmp_path / "run.yaml"
    path.write_text("prompt:\n  [" + "a," * 100_000 + "]")
    assert "run.yaml:2: holds too many values; allowed: 2000" in refusal(path)


def test_of_very_many_mistakes_the_first_are_listed_and_the_rest_counted(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("".join(f"unknown{i}: 1\n" for i in range(3000)) + "unknown0: 1\n" * 200)
    message = refusal(path)
    # 200 duplicate keys, 20 of the 3000 unknown keys, and the number of the others.
    assert message.startswith("221 mistakes") and "and 121 more" in message and len(message) < 20_000


def test_an_override_of_thousands_of_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("prompt: a\n")
    assert "key.sub=value" in refusal(path, "a." * 50_000 + "a=1")


def test_bytes_of_a_command_line_that_are_not_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("prompt: a\n")
    message = refusal(path, os.fsdecode(b"prompt=caf\xe9"), os.fsdecode(b"r\xfcn.dir=x"))
    assert message.startswith("2 mistakes")
    assert "override prompt=caf\\udce9: byte 0xe9 is not UTF-8" in message
    assert "unknown key r\\udcfcn" in message


def test_a_message_shows_no_control_character_of_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "run\x1b[31m\u202e.yaml"
    path.write_text('"a\\e[31m\\u202e": 1\n"a\\e[31m\\u202e": 1\nprior: {dtype: "\\u0007\\u202e"}\n')
    message = refusal(path, "prompt=[\u202e", "score.x\u202e=1")
    assert message.startswith("5 mistakes")
    assert all(line.isprintable() for line in message.splitlines())


@pytest.mark.parametrize("name", ["a" * 300, "a/" * 3000 + "b", "a\0b", "~nosuchuser/run.yaml", "", "\udcff.yaml"])
def test_a_path_that_cannot_be_is_a_configuration_error(name: str) -> None:
    said = refusal(Path(name))
    assert "configuration file" in said or "cannot be" in said
    assert said.isprintable() and len(said) < 1000


def test_what_is_no_regular_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    pipe, place = tmp_path / "pipe", tmp_path / "socket"
    os.mkfifo(pipe)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        for path in (pipe, place, Path("/dev/zero"), Path("/dev/null")):
            assert f"{path} is a pipe, a socket or a device" in refusal(path)


def test_a_file_that_is_too_large_is_refused_with_the_limit_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    with path.open("wb") as stream:
        stream.truncate(2**42)  # sparse: it takes no block of the disk
    assert "16 MiB" in refusal(path)


def test_many_aliases_do_not_grow(tmp_path: Path) -> None:
    # Nested lists of ten references each: 10^12 texts if the aliases were expanded.
    lines = ["x0: &x0 [a]"] + [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]" for i in range(1, 13)]
    path = tmp_path / "run.yaml"
    path.write_text("\n".join(lines) + "\nprompt: *x12\n")
    assert "prompt entry 0" in refusal(path)


def test_the_most_rows_of_exact_numerics_are_those_that_its_sum_can_add() -> None:
    from distvsd.config.relations import MOST_EXACT_ROWS
    from distvsd.parallel.reduce import MAX_ADDENDS

    assert MOST_EXACT_ROWS == MAX_ADDENDS
