"""A configuration as plain data: YAML that reads back to the same, a digest, and the difference of two."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from typing import Any

from distvsd.config.schedule import Schedule
from distvsd.config.schema import Config
from distvsd.config.stages import StageConfig

# What changes no bit of the result: where a run lies, what is kept and reported, how long ranks are waited for. How
# work is divided and which renders travel changes rounding in fast numerics, as the number of ranks does, and no exact
# bit.
BOOKKEEPING = (
    "run.dir",
    "particles.micro_batch",
    "particles.host",
    "particles.page_dir",
    "particles.recompute",
    "score.micro_batch",
    "parallel.timeout_s",
    "parallel.exchange",
    "checkpoint.",
    "log.",
)


def to_dict(config: Config) -> dict[str, Any]:
    """Every field as plain data, in the order of the schema: what YAML and JSON can hold. Empty `stages` are left out,
    so that a configuration without stages reads as in versions before there were any."""
    plain = _plain(config)
    assert isinstance(plain, dict), "a configuration is a mapping"
    if not config.stages:
        del plain["stages"]
    return plain


def to_yaml(config: Config) -> str:
    """Every field as YAML that `load_config` reads back to an equal Config; write it as UTF-8."""
    lines = []
    for section, value in to_dict(config).items():
        lines.extend(_yaml_lines(section, value, ""))
    return "".join(lines)


def digest(config: Config) -> str:
    """SHA-256 of the fields that change the result: all but those of BOOKKEEPING."""
    chosen = {key: value for key, value in _flat(to_dict(config)).items() if not is_bookkeeping(key)}
    text = json.dumps(chosen, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def diff(a: Config, b: Config) -> list[tuple[str, Any, Any]]:
    """Fields that differ: dotted key, plain value in `a`, plain value in `b`, in the order of the schema. None stands
    for a field that a stage does not change, or for one of a stage that is not there."""
    first, second = _flat(to_dict(a)), _flat(to_dict(b))
    keys = dict.fromkeys([*first, *second])
    return [(key, first.get(key), second.get(key)) for key in keys if first.get(key) != second.get(key)]


def is_bookkeeping(key: str) -> bool:
    """Whether the field with this dotted key, of a stage or of the run, changes no bit of the result."""
    return re.sub(r"^stages\.\d+\.", "", key).startswith(BOOKKEEPING)


def recorded_keys(text: str) -> set[str]:
    """The dotted keys of a configuration that `to_yaml` wrote; those of an older version lack newer fields."""
    import yaml

    return set(_flat(yaml.safe_load(text)))


def _yaml_lines(key: str, value: Any, indent: str) -> list[str]:
    """A section as an indented block, a value on its key's line, texts of a list one a line, stages as a list of
    blocks."""
    if isinstance(value, dict) and not _is_schedule(value):
        inner = [line for name, item in value.items() for line in _yaml_lines(name, item, indent + "  ")]
        return [f"{indent}{key}:\n", *inner]
    if isinstance(value, list) and isinstance(value[0], dict):
        entries = [[line for name, item in entry.items() for line in _yaml_lines(name, item, "  ")] for entry in value]
        return [f"{key}:\n", *(line for first, *rest in entries for line in (f"- {first.lstrip()}", *rest))]
    if isinstance(value, list) and isinstance(value[0], str):
        return [f"{indent}{key}:\n", *(f"{indent}- {_yaml_value(text)}\n" for text in value)]
    return [f"{indent}{key}: {_yaml_value(value)}\n"]


def _yaml_value(value: Any) -> str:
    """One line of YAML, whatever the text."""
    # A text of several lines is quoted with escapes, so that it does not depend on indentation. To YAML 1.1 a line also
    # ends at U+0085, U+2028 and U+2029, which it would read back as a space. Other characters that do not print, such
    # as direction marks, would make a terminal show a different text.
    escaped = isinstance(value, str) and not value.isprintable()
    return _dumped(value, '"' if escaped else None, allow_unicode=not escaped)


def _dumped(value: Any, style: str | None, allow_unicode: bool) -> str:
    import yaml

    text = yaml.safe_dump(
        value, default_flow_style=True, default_style=style, allow_unicode=allow_unicode, width=math.inf
    )
    return str(text.removesuffix("\n").removesuffix("\n..."))  # "..." ends a document that is one bare value


def _plain(value: object) -> object:
    if isinstance(value, Schedule):
        if len(value.points) == 1:
            return _number(value.points[0][1])
        points = {round: _number(number) for round, number in value.points}
        return points if value.kind == "step" else {value.kind: points}
    if isinstance(value, StageConfig):
        return {"name": value.name} | _nested(value.changes)
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return _number(value) if isinstance(value, float) else value


def _nested(changes: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """Dotted keys and their values as sections in sections."""
    nested: dict[str, Any] = {}
    for key, value in changes:
        *sections, name = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = _plain(value)
    return nested


def _number(value: float) -> float:
    """Whole numbers without their point: a resolution of 64 is written 64."""
    return int(value) if value == int(value) and abs(value) < 2**53 else value


def _flat(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of the schema's fields, those of stages as `stages.1.`; a schedule, whose keys are rounds, stays one
    value."""
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        if isinstance(value, list) and isinstance(value[0], dict):
            for number, entry in enumerate(value, 1):
                flat.update(_flat(entry, f"{prefix}{key}.{number}."))
        elif isinstance(value, dict) and not _is_schedule(value):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _is_schedule(value: dict[Any, Any]) -> bool:
    return set(value) == {"linear"} or all(isinstance(key, int) for key in value)
