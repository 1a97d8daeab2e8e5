"""The strict loader: a YAML file and `key.sub=value` overrides become a Config, or one error with every mistake."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from distvsd.config.canonical import diff, digest, to_dict, to_yaml
from distvsd.config.document import Entry, plain_entry, read_document, read_override, shown_path
from distvsd.config.relations import RELATIONS
from distvsd.config.scalars import SHOWN, printable
from distvsd.config.schedule import Schedule
from distvsd.config.schema import Config
from distvsd.config.values import Mistake, convert, named, nearest
from distvsd.errors import ConfigError

__all__ = ["config_from", "diff", "digest", "load_config", "to_dict", "to_yaml"]

# What a message shows; a file of another kind can hold thousands of mistakes.
MAX_MISTAKES = 100
MAX_UNKNOWN = 20  # keys of one section: a near one is looked for for each


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Reads a configuration; later overrides win, and a section given twice is merged field by field.

    Raises ConfigError with all mistakes, each with its place, dotted key, allowed values and the nearest known key.
    """
    mistakes: list[str] = []
    layers = [read_document(Path(path), mistakes)]
    for text in overrides:
        entry = read_override(text, mistakes)
        if entry is not None:
            layers.append(entry)
    return _config_of(layers, mistakes, shown_path(Path(path)), "; nothing was started")


def config_from(plain: Mapping[str, Any], where: str) -> Config:
    """The configuration that `to_dict` made plain, also after a way through JSON; where: names it in errors.

    Raises ConfigError as `load_config` does.
    """
    return _config_of([plain_entry(plain, where)], [], where, "")


def _config_of(layers: Sequence[Entry], mistakes: list[str], where: str, consequence: str) -> Config:
    """The configuration of all layers, the last one winning. Raises ConfigError with `mistakes` and those it finds."""
    reader = _Reader(mistakes)
    config = reader.section(Config, "", layers)
    reader.relations(config)
    if mistakes:
        noun = "mistake" if len(mistakes) == 1 else "mistakes"
        listed = "".join(f"\n  {mistake}" for mistake in mistakes[:MAX_MISTAKES])
        more = f"\n  and {len(mistakes) - MAX_MISTAKES} more" if len(mistakes) > MAX_MISTAKES else ""
        raise ConfigError(f"{len(mistakes)} {noun} in the configuration {where}{consequence}:{listed}{more}")
    assert isinstance(config, Config), "the outermost section is the configuration"
    return config


@cache
def hints(section: type) -> dict[str, Any]:
    """Annotations of a section's fields, with their ranges."""
    return get_type_hints(section, include_extras=True)


@cache
def dotted_keys(section: type = Config, prefix: str = "") -> tuple[str, ...]:
    """All dotted keys, sections too, in the order of the schema."""
    keys: list[str] = []
    for field in dataclasses.fields(section):
        keys.append(prefix + field.name)
        if is_section(hints(section)[field.name]):
            keys.extend(dotted_keys(hints(section)[field.name], f"{prefix}{field.name}."))
    return tuple(keys)


def is_section(annotation: object) -> bool:
    """Whether a field is a section of fields rather than a value."""
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation) and annotation is not Schedule


class _Reader:
    """Collects the mistakes of all sections; a field with a mistake keeps its default so that reading goes on."""

    def __init__(self, mistakes: list[str]) -> None:
        self.mistakes = mistakes
        self.places: dict[str, str] = {}
        self.wrong: set[str] = set()

    def section(self, section: type, prefix: str, layers: Sequence[Entry]) -> Any:
        mappings = [layer for layer in layers if self._is_mapping(layer, prefix)]
        for layer in mappings:
            self._report_unknown(section, prefix, layer)
        values = {}
        for name, annotation in hints(section).items():
            found = [layer.value[name] for layer in mappings if name in layer.value]  # type: ignore[index,operator]
            if not found:
                continue
            if is_section(annotation):
                values[name] = self.section(annotation, f"{prefix}{name}.", found)
            else:
                self._field(prefix + name, annotation, found[-1], values)
        return section(**values)

    def relations(self, config: Config) -> None:
        for relation in RELATIONS:
            if self.wrong.intersection(relation.keys):
                continue
            message = relation.broken(config)
            if message:
                blamed = next((key for key in relation.keys if key in self.places), relation.keys[0])
                place = self.places.get(blamed, "default")
                self.mistakes.append(f"{place}: {relation.keys[0]} {message}")

    def _field(self, key: str, annotation: object, entry: Entry, values: dict[str, object]) -> None:
        self.places[key] = entry.where
        try:
            values[key.rpartition(".")[2]] = convert(entry, annotation)
        except Mistake as mistake:
            self.wrong.add(key)
            self.mistakes.append(f"{entry.where}: {key} {mistake}")

    def _is_mapping(self, layer: Entry, prefix: str) -> bool:
        if isinstance(layer.value, dict):
            return True
        key = prefix.rstrip(".")
        self.wrong.update(known for known in dotted_keys() if known.startswith(prefix))
        example = next(known for known in dotted_keys() if known.startswith(prefix)).removeprefix(prefix)
        hint = (
            "give it fields or delete the line" if layer.value is None else f"it holds fields such as {key}.{example}"
        )
        self.mistakes.append(f"{layer.where}: {key} is {named(layer.value)}, but it is a section; {hint}")
        return False

    def _report_unknown(self, section: type, prefix: str, layer: Entry) -> None:
        known = list(hints(section))
        unknown = [(name, entry) for name, entry in layer.value.items() if name not in known]  # type: ignore[attr-defined]
        for name, entry in unknown[:MAX_UNKNOWN]:
            shown = printable(name, SHOWN) if isinstance(name, str) else named(name)
            near = _suggest(name if isinstance(name, str) else shown, prefix, known)
            self.mistakes.append(f"{entry.where}: unknown key {prefix}{shown}; {near}")
        if len(unknown) > MAX_UNKNOWN:
            where = unknown[MAX_UNKNOWN][1].where
            self.mistakes.append(f"{where}: and {len(unknown) - MAX_UNKNOWN} more keys that are unknown here")


def _suggest(name: str, prefix: str, known: Sequence[str]) -> str:
    """The nearest key: among its siblings first, then as a whole key, then a field of that name in another section."""
    close = nearest(name, known)
    if close:
        return f"did you mean {prefix}{close}?"
    last = {key.rpartition(".")[2]: key for key in reversed(dotted_keys())}
    close = nearest(prefix + name, dotted_keys()) or last.get(nearest(name, list(last)), "")
    if close:
        return f"did you mean {close}?"
    return f"known here: {', '.join(known)}"
