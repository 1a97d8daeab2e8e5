"""The list under `stages`, and overrides such as `stages.1.schedule.rounds=50`, as stages."""

from __future__ import annotations

import json
from collections.abc import Sequence

from distvsd.config.canonical import to_dict
from distvsd.config.document import Entry
from distvsd.config.reader import Reader, hints
from distvsd.config.schema import Config
from distvsd.config.stages import StageConfig
from distvsd.config.values import named

# Most characters of all stages as JSON. This keeps a configuration that the program writes within the limits of
# `document.py`, whatever the characters.
MAX_STAGES_TEXT = 2**15
_NAME_KEY = "name"


def read_stages(layers: Sequence[Entry], config: Config, outer: Reader) -> tuple[StageConfig, ...]:
    """The stages of all layers: the last list, with the overrides applied to its stages.

    config: the configuration that the stages change, itself without stages. outer: its reader, which gets the mistakes.
    """
    stages = []
    for number, entries in enumerate(_merged(layers, outer.mistakes), 1):
        stages.append(_stage(number, entries, config, outer))
    whole = Config(stages=tuple(stages))
    if stages and (length := len(json.dumps(to_dict(whole)["stages"]))) > MAX_STAGES_TEXT:
        where = layers[-1].where
        outer.mistakes.append(f"{where}: stages take {length} characters as JSON; allowed: at most {MAX_STAGES_TEXT}")
    return whole.stages


def _merged(layers: Sequence[Entry], mistakes: list[str]) -> list[list[Entry]]:
    """The entries of each stage, those of overrides last."""
    merged: list[list[Entry]] = []
    for layer in layers:
        if isinstance(layer.value, list):
            merged = [[entry] for entry in layer.value]
            continue
        if not isinstance(layer.value, dict):
            mistakes.append(f"{layer.where}: stages is {named(layer.value)}; allowed: a list, each with a `name`")
            continue
        for key, entry in layer.value.items():
            number = int(key) if str(key).isdecimal() and len(str(key)) < 10 else 0
            if 1 <= number <= len(merged):
                merged[number - 1].append(entry)
            else:
                there = f"stages 1 to {len(merged)}" if merged else "no stages, which are a list"
                mistakes.append(f"{entry.where}: stages.{key!s:.20} is not there; the configuration has {there}")
    return merged


def _stage(number: int, entries: list[Entry], config: Config, outer: Reader) -> StageConfig:
    reader = Reader(outer.mistakes, outer, f"stages.{number}.")
    named_by: list[Entry] = []
    rest = []
    for entry in entries:
        value = entry.value
        if isinstance(value, dict) and _NAME_KEY in value:
            named_by.append(value[_NAME_KEY])
            value = {key: item for key, item in value.items() if key != _NAME_KEY}
        rest.append(Entry(value, entry.where))
    name: dict[str, str] = {}
    if named_by:
        reader.value(_NAME_KEY, hints(StageConfig)[_NAME_KEY], named_by[-1], name)
    elif isinstance(entries[0].value, dict):
        outer.mistakes.append(f"{entries[0].where}: stages.{number} has no name; give it one, such as `name: geometry`")
    changes = reader.fields(Config, "", rest)
    reader.relations(config.with_changes(changes))
    return StageConfig(name.get(_NAME_KEY, "unnamed"), tuple(changes.items()))
