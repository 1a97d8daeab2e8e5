"""From entries to the typed fields of sections, with every mistake collected."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache
from typing import Any, get_type_hints

from distvsd.config.document import Entry
from distvsd.config.relations import RELATIONS
from distvsd.config.scalars import SHOWN, printable
from distvsd.config.schedule import Schedule
from distvsd.config.schema import Config
from distvsd.config.stages import may_change
from distvsd.config.values import Mistake, convert, named, nearest

MAX_UNKNOWN = 20  # keys of one section; for each the nearest known key is searched


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


class Reader:
    """Reads the fields of the configuration, or of one stage, and collects the mistakes; a field with a mistake is left
    out so that reading goes on."""

    def __init__(self, mistakes: list[str], outer: Reader | None = None, scope: str = "") -> None:
        """outer: for a stage, the reader of the configuration that it changes. scope: what its keys begin with."""
        self.mistakes, self._scope, self._is_stage = mistakes, scope, outer is not None
        self._places: dict[str, str] = dict(outer._places) if outer else {}
        self._wrong: set[str] = set(outer._wrong) if outer else set()
        self._read: set[str] = set()

    def fields(self, section: type, prefix: str, layers: Sequence[Entry]) -> dict[str, Any]:
        """The values of all fields that the layers hold, by dotted key in the order of the schema; the last layer wins.
        `stages` are left as they are, the entries of all layers."""
        mappings = [layer for layer in layers if self._is_mapping(layer, prefix)]
        for layer in mappings:
            self._report_unknown(prefix, layer, self._known(section, prefix))
        values: dict[str, Any] = {}
        for name in self._known(section, prefix):
            found = [layer.value[name] for layer in mappings if name in layer.value]  # type: ignore[index,operator]
            annotation = hints(section)[name]
            if not found:
                continue
            if is_section(annotation):
                values |= self.fields(annotation, f"{prefix}{name}.", found)
            elif prefix + name == "stages":
                values[name] = found
            else:
                self.value(prefix + name, annotation, found[-1], values)
        return values

    def value(self, key: str, annotation: object, entry: Entry, values: dict[str, Any]) -> None:
        """Puts the value of one field into `values`."""
        self._places[key] = entry.where
        self._read.add(key)
        self._wrong.discard(key)
        try:
            values[key] = convert(entry, annotation)
        except Mistake as mistake:
            self._wrong.add(key)
            self.mistakes.append(f"{entry.where}: {self._scope}{key} {mistake}")

    def relations(self, config: Config) -> None:
        """Reports relations between fields that do not hold; for a stage, only those with a field that it changes."""
        for relation in RELATIONS:
            if self._wrong.intersection(relation.keys) or (self._is_stage and self._read.isdisjoint(relation.keys)):
                continue
            message = relation.broken(config)
            if message:
                own = [key for key in relation.keys if key in self._read]
                blamed = next((key for key in (*own, *relation.keys) if key in self._places), relation.keys[0])
                place = self._places.get(blamed, "default")
                self.mistakes.append(f"{place}: {self._scope}{relation.keys[0]} {message}")

    def _known(self, section: type, prefix: str) -> list[str]:
        return [name for name in hints(section) if not self._is_stage or may_change(prefix + name)]

    def _is_mapping(self, layer: Entry, prefix: str) -> bool:
        if isinstance(layer.value, dict):
            return True
        key = f"{self._scope}{prefix}".rstrip(".")
        below = [known for known in dotted_keys() if known.startswith(prefix)]
        self._wrong.update(below)
        example = next(known for known in below if not self._is_stage or may_change(known)).removeprefix(prefix)
        hint = (
            "give it fields or delete the line" if layer.value is None else f"it holds fields such as {key}.{example}"
        )
        self.mistakes.append(f"{layer.where}: {key} is {named(layer.value)}, but it is a section; {hint}")
        return False

    def _report_unknown(self, prefix: str, layer: Entry, known: Sequence[str]) -> None:
        unknown = [(name, entry) for name, entry in layer.value.items() if name not in known]  # type: ignore[attr-defined]
        for name, entry in unknown[:MAX_UNKNOWN]:
            shown = printable(name, SHOWN) if isinstance(name, str) else named(name)
            if self._is_stage and f"{prefix}{name}" in dotted_keys():
                self.mistakes.append(
                    f"{entry.where}: {self._scope}{prefix}{name} cannot be changed by a stage; set {prefix}{name} for "
                    "the whole run"
                )
                continue
            near = self._suggest(name if isinstance(name, str) else shown, prefix, known)
            self.mistakes.append(f"{entry.where}: unknown key {self._scope}{prefix}{shown}; {near}")
        if len(unknown) > MAX_UNKNOWN:
            where = unknown[MAX_UNKNOWN][1].where
            self.mistakes.append(f"{where}: and {len(unknown) - MAX_UNKNOWN} more keys that are unknown here")

    def _suggest(self, name: str, prefix: str, known: Sequence[str]) -> str:
        """The nearest key: among its siblings first, then as a whole key, then a field of that name in another
        section."""
        close = nearest(name, known)
        if close:
            return f"did you mean {self._scope}{prefix}{close}?"
        keys = [key for key in dotted_keys() if not self._is_stage or may_change(key)]
        last = {key.rpartition(".")[2]: key for key in reversed(keys)}
        close = nearest(prefix + name, keys) or last.get(nearest(name, list(last)), "")
        if close:
            return f"did you mean {self._scope}{close}?"
        return f"known here: {', '.join(known)}"
