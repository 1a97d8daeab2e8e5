"""Configuration files: valid ones, changed files of the project, and random bytes.

An accepted configuration must be equal after it is written and read back, and `distvsd plan` must accept it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from distvsd.config import Config, Schedule, digest, load_config, to_yaml
from distvsd.config.load import dotted_keys, hints, is_section
from distvsd.config.ranges import Range
from distvsd.config.stages import may_change
from distvsd.errors import ConfigError, DistvsdError
from distvsd.plan.text import draw as drawn
from distvsd.run.planned import plan_run

FOLDER = Path(__file__).parents[2] / "configs"
TAGS = (
    "bool",
    "int",
    "float",
    "null",
    "str",
    "timestamp",
    "binary",
    "set",
    "omap",
    "pairs",
    "seq",
    "map",
    "merge",
    "value",
    "python/name:os.system",
    "x",
)
WORDS = (
    *("", "~", "null", "yes", "Off", "maybe", "=", "<<", "-", "?", ":", "[]", "{}", "[", "]}", "|", ">", "%", "@", "`"),
    *("0", "-0", "1", "-1", "2", "8", "64", "0.5", "1e-3", "1.", ".5", "1e400", "-1e-400", ".inf", "-.INF", ".nan"),
    *("0b", "0b1", "0b_", "0x", "0xffffffffffffffffff", "0o7", "017", "08", "1_0", "_1", "1:30", "1:60", "-1:2:3.5"),
    *("2147483647", "2147483648", "1000000000", "1000000000000", "9" * 99, "9" * 5000, "0." + "0" * 400 + "1"),
    *("1" + ":59" * 60, "1" + ":59" * 3000, "0b" + "1" * 90, "0x" + "f" * 5000, "0.9999999999999999", "5e-324"),
    *("2026-11-23", "2026-13-45", "2026-11-23T01:02:03.4567891234567890Z", "9999-12-31t23:59:60-99:99"),
    *('"\\ud83d\\ude00"', '"\\ud83d"', '"\\U00110000"', '"\\UFFFFFFFF"', '"\\0"', '"\\x1b[31m"', '"\\u202e"', "'a'''"),
    *("a red cube", "caf\u00e9", "\U0001f600", "\u2028", "\ufeff", "\x85", "a: b", "a #b", "*a", "&a", "&a b", "!!x y"),
    *("~nosuchuser/a", "/dev/zero", "/proc/self/mem", "a" * 300, "../" * 50, "x" * 100_001, "shapes", "runs/a"),
    *("vsd", "sds", "nerf", "image", "latent", "exact", "fast", "flat", "ddp", "online", "bfloat16", "torch"),
    *("[0.9, 0.99]", "[1, 2, 3]", "[2, 1]", "{0: 0.5}", "{0: 64, 5: 128}", "{linear: {0: 64, 9: 8}}", "{1: 2}"),
    *("{-1: 2}", "{0: 1, 0: 2}", "{step: {0: 1}}", "{0: {0: 1}}", "{.nan: 1}", "{[a]: 1}", "{? a : b}", "[[1]]"),
)


def attempt(draw: random.Random, folder: Path) -> None:
    path = folder / "run.yaml"
    path.write_bytes(_content(draw))
    check(draw, folder, lambda: load_config(path))


def check(draw: random.Random, folder: Path, load: Callable[[], Config]) -> None:
    """Loads a configuration. A refusal must be short and printable. An accepted one must pass the round trip and the
    plan."""
    try:
        config = load()
    except ConfigError as error:
        assert len(str(error)) < 100_000, f"a message of {len(str(error))} characters"
        assert all(line.isprintable() for line in str(error).split("\n")), f"unprintable: {str(error)!r}"
        raise
    again = folder / "again.yaml"
    text = to_yaml(config)
    assert all(line.isprintable() for line in text.split("\n")), "the resolved configuration is not printable"
    again.write_text(text, encoding="utf-8")
    try:
        back = load_config(again)
    except DistvsdError as error:
        raise AssertionError(f"an accepted configuration is refused when it is read back: {error}") from error
    assert back == config and digest(back) == digest(config), "the configuration that is read back differs"
    nodes, ranks = draw.choice((1, 2, 7, 10**6)), draw.choice((1, 8, 1024))
    plan = plan_run(config, nodes, ranks)
    json.dumps(plan, allow_nan=False)
    assert len(drawn(plan)) < 30_000, "the plan is too long to be read"


def _content(draw: random.Random) -> bytes:
    kinds = (_grammar, _grammar, _changed_values, _changed_values, _changed_text, _changed_text, _nested, _noise)
    data = draw.choice(kinds)(draw)
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogatepass" if draw.random() < 0.5 else "replace")
    return _flipped(draw, data) if draw.random() < 0.1 else data


@cache
def _sources() -> tuple[str, ...]:
    return tuple(path.read_text(encoding="utf-8") for path in sorted(FOLDER.rglob("*.yaml")))


def value(draw: random.Random, key: str, nasty: float) -> str:
    """A YAML value for this field: one that its annotation allows, or with probability `nasty` any text."""
    if draw.random() < nasty:
        word = draw.choice(WORDS)
        return f"!!{draw.choice(TAGS)} {word}" if draw.random() < 0.2 else word
    if key == "stages":
        return _stages(draw, nasty)
    section: Any = Config
    *outer, name = key.split(".")
    for part in outer:
        section = hints(section)[part]
    annotation, marks = hints(section)[name], ()
    if is_section(annotation):
        return "{}"
    if hasattr(annotation, "__metadata__"):
        annotation, marks = annotation.__origin__, annotation.__metadata__
    return _fitting(draw, annotation, next((mark for mark in marks if isinstance(mark, Range)), Range()))


def _stages(draw: random.Random, nasty: float) -> str:
    """A list of stages that change one field each. With probability `nasty` fields that no stage may change are
    possible."""
    fields = [key for key in dotted_keys() if "." in key and not is_a_section(key)]
    stages = []
    for number in range(draw.randint(1, 4)):
        key = draw.choice([key for key in fields if draw.random() < nasty or may_change(key)])
        *outer, name = key.split(".")
        text = f"{name}: {value(draw, key, nasty)}"
        for part in reversed(outer):
            text = f"{part}: {{{text}}}"
        stages.append(f"{{name: s{number}, {text}}}")
    return f"[{', '.join(stages)}]"


def _fitting(draw: random.Random, annotation: Any, allowed: Range) -> str:
    if get_origin(annotation) is Literal:
        return str(draw.choice(get_args(annotation)))
    if annotation is bool:
        return draw.choice(("true", "false"))
    if annotation in (int, float, Schedule) or get_origin(annotation) is tuple:
        low, high = max(allowed.low, -1e9), min(allowed.high, 1e9)
        numbers = [draw.choice((low, high, low + (high - low) * draw.random() ** 8)) for _ in range(2)]
        if annotation is int or allowed.integer:
            step = allowed.multiple_of or 1
            numbers = [int(number) // step * step for number in numbers]
        if annotation in (int, float):
            return str(numbers[0])
        if annotation is Schedule:
            points = ", ".join(f"{round}: {numbers[round % 2]}" for round in range(draw.randint(1, 3)))
            return draw.choice((str(numbers[0]), f"{{{points}}}", f"{{linear: {{{points}}}}}"))
        return str(sorted(numbers))
    return json.dumps(draw.choice(("a red cube", "shapes", "", "\u202e", "caf\u00e9 \U0001f600", "12:30", "a\nb")))


def _grammar(draw: random.Random) -> str:
    """A mapping of fields of the schema, in flow style or in block style."""
    tree: dict[str, Any] = {}
    nasty = draw.choice((0.0, 0.0, 0.05, 0.5))
    for key in draw.choices(dotted_keys(), k=draw.choice((1, 3, 10, 60))):
        *outer, name = key.split(".")
        place = tree
        for part in outer:
            inner = place.setdefault(part, {})
            place = inner if isinstance(inner, dict) else place
        place.setdefault(name, {} if is_a_section(key) else value(draw, key, nasty))
    return _written(draw, tree, 0 if draw.random() < 0.5 else None)


def is_a_section(key: str) -> bool:
    return any(other.startswith(f"{key}.") for other in dotted_keys())


def _written(draw: random.Random, tree: dict[str, Any], indent: int | None) -> str:
    if indent is None:
        return (
            "{"
            + ", ".join(f"{k}: {_written(draw, v, None) if isinstance(v, dict) else v}" for k, v in tree.items())
            + "}"
        )
    lines = []
    for key, item in tree.items():
        text = ("\n" + _written(draw, item, indent + 2)) if isinstance(item, dict) and item else item or "''"
        lines.append(f"{' ' * indent}{key}: {text}\n".replace("\n\n", "\n"))
    return "".join(lines)


def _changed_values(draw: random.Random) -> str:
    """A configuration of the project with random changes of values, keys and structure."""
    tree = yaml.safe_load(draw.choice(_sources()))
    for _ in range(draw.choice((0, 1, 1, 2, 5))):
        place: Any = tree
        while isinstance(place, dict | list) and place and draw.random() < 0.8:
            key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], dict | list) or draw.random() < 0.2:
                place[key] = _thing(draw, 3)
                break
            place = place[key]
        if isinstance(place, dict) and draw.random() < 0.3:
            place[draw.choice(("x", 3, None, 0.5, draw.choice(WORDS)[:50], *dotted_keys()[:5]))] = _thing(draw, 2)
    style = draw.choice((None, True, False))
    if draw.random() < 0.3:
        return json.dumps(tree, default=str)
    return str(yaml.safe_dump(tree, default_flow_style=style, allow_unicode=draw.random() < 0.5, sort_keys=False))


def _thing(draw: random.Random, depth: int) -> Any:
    """Any value that YAML can hold."""
    kind = draw.randrange(9 if depth else 7)
    if kind == 7:
        return [_thing(draw, depth - 1) for _ in range(draw.randint(0, 3))]
    if kind == 8:
        return {draw.choice(("a", 0, 1, 5, None, "linear", "count")): _thing(draw, depth - 1) for _ in range(3)}
    return (
        draw.choice((None, True, False)),
        draw.choice((0, 1, -1, 4, 64, 2**31, 2**63, 10**30, -(10**90))),
        draw.choice((0.0, -0.0, 0.5, 1e-300, 1e308, float("inf"), float("nan"), 0.1 + 0.2)),
        draw.choice(("", "a", "\0", "\x1b", "yes", "12", "\u2028", "x" * 3000, "1e3", "0x", "=", "\U000e0001")),
        "".join(
            chr(draw.choice((draw.randrange(32, 127), draw.randrange(0xD800)))) for _ in range(draw.randint(0, 20))
        ),
        draw.choice(WORDS),
        draw.randbytes(draw.randint(0, 5)),
    )[kind]


def _changed_text(draw: random.Random) -> str:
    """The text of a configuration of the project with lines, words and characters removed, repeated or inserted."""
    text = draw.choice(_sources())
    for _ in range(draw.choice((0, 1, 1, 2, 5, 20))):
        lines = text.split("\n")
        line = draw.randrange(len(lines))
        at = draw.randrange(len(text) + 1)
        end = min(len(text), at + draw.choice((1, 1, 5, 50)))
        match draw.randrange(8):
            case 0:
                del lines[line]
                text = "\n".join(lines) or "a: b"
            case 1:
                text = "\n".join([*lines[:line], lines[draw.randrange(len(lines))], *lines[line:]])
            case 2:
                key, colon, _ = lines[line].partition(":")
                text = "\n".join([*lines[:line], f"{key}{colon} {draw.choice(WORDS)}", *lines[line + 1 :]])
            case 3:
                text = text[:at] + text[end:]
            case 4:
                text = text[:at] + draw.choice(WORDS) + text[at:]
            case 5:
                text = text[:at] + draw.choice("\t\n\r\0\x1b\x85\u2028\ufeff:-?[]{},&*!|>'\"%@`#<= \ud800") + text[at:]
            case 6:
                text = text[:at] + text[at:end] * draw.choice((2, 3, 50)) + text[end:]
            case 7:
                text = text.replace(": ", f": !!{draw.choice(TAGS)} ", draw.choice((1, 3)))
    return text


def _nested(draw: random.Random) -> str:
    """Deep nesting, wide collections and YAML aliases."""
    depth = draw.choice((5, 30, 33, 330, 5000))
    inner = draw.choice(WORDS)
    match draw.randrange(7):
        case 0:
            return "prompt: " + "[" * depth + inner + "]" * draw.choice((0, depth))
        case 1:
            return "prompt: " + "{a: " * depth + inner + "}" * draw.choice((0, depth))
        case 2:
            return draw.choice(("- ", "? ", "a: &a ", "- &a ")) * depth + inner
        case 3:
            return "\n".join(" " * level + "run:" for level in range(min(depth, 600)))
        case 4:
            lines = ["x0: &x0 [a]"] + [
                f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" for i in range(1, min(depth, 300))
            ]
            return "\n".join([*lines, f"prompt: *x{len(lines) - 1}"])
        case 5:
            return f"prompt: [&a {inner}" + ", *a" * depth + "]\nparticles: {count: " + str(depth + 1) + "}"
        case _:
            return "objective: {t_max: {" + ", ".join(f"{i}: 0.{i}" for i in range(depth)) + "}}"


def _noise(draw: random.Random) -> bytes | str:
    match draw.randrange(4):
        case 0:
            return draw.randbytes(draw.choice((0, 1, 10, 1000)))
        case 1:
            return "".join(draw.choices("\n\t -?:,[]{}#&*!|>'\"%@`ab01.~\\<=", k=draw.choice((3, 30, 300))))
        case 2:
            return draw.choice(
                (b"\xef\xbb\xbf", b"\xff\xfe", b"%YAML 1." + b"9" * 5000 + b"\n---\n", b"--- ", b"... ")
            ) + (draw.choice(_sources()).encode(draw.choice(("utf-8", "utf-16", "latin-1", "utf-32")), "replace"))
        case _:
            return "\n".join(
                f"{draw.choice(('a', 'run', 'prompt', '?', '- '))}: {draw.choice(WORDS)}" for _ in range(9)
            )


def _flipped(draw: random.Random, data: bytes) -> bytes:
    """The data with some bytes changed or the end cut off."""
    changed = bytearray(data[: draw.randint(0, len(data))] if draw.random() < 0.3 else data)
    for _ in range(min(len(changed), draw.choice((1, 3, 30)))):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)
