"""YAML text, and `key=value` overrides, as values that remember where they were written."""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

import yaml

from distvsd.errors import ConfigError


@dataclass(frozen=True)
class Entry:
    """One value and its place, `FILE:LINE` or `override key=value`.

    value: a scalar, a list of entries, or a mapping from keys to entries.
    """

    value: object
    where: str


def read_document(path: Path, mistakes: list[str]) -> Entry:
    """The mapping in a file; duplicate keys are added to `mistakes`. Raises ConfigError if there is nothing to read."""
    text = _read_text(path)
    node = _compose(text, str(path))
    if node is None:
        raise ConfigError(f"{path} is empty; a configuration is a mapping such as `prompt: a red cube`")
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{path}:{node.start_mark.line + 1}: the file holds {_node_name(node)}, not a mapping; "
            "a configuration is a mapping such as `prompt: a red cube`"
        )
    return _Reader(str(path), mistakes).entry(node)


def read_override(text: str, mistakes: list[str]) -> Entry | None:
    """`a.b=value` as the mapping {a: {b: value}}; None, and a mistake, if it is not of this form."""
    key, equals, value = text.partition("=")
    names = key.strip().split(".")
    where = f"override {text[:80]}" + ("..." if len(text) > 80 else "")
    if not equals or not all(names):
        mistakes.append(f"{where}: is not of the form key.sub=value, such as particles.count=4")
        return None
    # Nothing after the sign is an empty text: `prompt=` is how a shell user writes the empty prompt.
    entry = Entry(None if value.strip() else "", where)
    try:
        node = _compose(value, None)
    except ConfigError as error:
        mistakes.append(f"{where}: {error}")
        return None
    if node is not None:
        entry = _Reader(None, mistakes, where).entry(node)
    for name in reversed(names):
        entry = Entry({name: entry}, where)
    return entry


def plain_entry(value: object, where: str) -> Entry:
    """Plain data as an entry. JSON has texts in the place of the rounds of a schedule; no field's name is a number."""
    if isinstance(value, dict):
        return Entry({_round_or_name(key): plain_entry(item, where) for key, item in value.items()}, where)
    return Entry([plain_entry(item, where) for item in value] if isinstance(value, list) else value, where)


def _round_or_name(key: object) -> object:
    return int(key) if isinstance(key, str) and re.fullmatch(r"\d{1,4000}", key, re.ASCII) else key


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise ConfigError(f"{path} is a directory, not a configuration file; give the YAML file itself")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give the path of a configuration file") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8 text"
        ) from error


def _node_name(node: yaml.Node) -> str:
    match node:
        case yaml.MappingNode():
            return "a mapping"
        case yaml.SequenceNode():
            return "a list"
    return "a single value"


def _compose(text: str, name: str | None) -> yaml.Node | None:
    """The node graph of one YAML document; None if it holds nothing. name: the file, None for an override."""
    try:
        loader = yaml.SafeLoader(text)
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}: " if name and mark else ""
        raise ConfigError(
            f"{place}is not YAML: {error.problem or error.context}; quote texts that hold : # [ {{"
        ) from error
    except yaml.reader.ReaderError as error:
        place = f"{name}:{text.count(chr(10), 0, error.position) + 1}: " if name else ""
        raise ConfigError(f"{place}is not YAML: character {error.character!r} is not allowed") from error
    except RecursionError as error:
        raise ConfigError(f"{name + ': ' if name else ''}is nested too deeply") from error


class _Reader:
    """Turns nodes into entries; aliases are shared, never copied, so a small file stays small."""

    def __init__(self, name: str | None, mistakes: list[str], override: str = "") -> None:
        self.name, self.mistakes, self.override = name, mistakes, override
        self.done: dict[int, Entry] = {}
        self.open: set[int] = set()
        self.constructor = yaml.SafeLoader("")

    def entry(self, node: yaml.Node) -> Entry:
        where = self._where(node)
        if id(node) in self.done:
            return Entry(self.done[id(node)].value, where)
        if id(node) in self.open:
            self.mistakes.append(f"{where}: an alias refers to the value it stands in; write the value out")
            return Entry(None, where)
        self.open.add(id(node))
        entry = Entry(self._value(node), where)
        self.open.remove(id(node))
        self.done[id(node)] = entry
        return entry

    def _where(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}" if self.name else self.override

    def _value(self, node: yaml.Node) -> object:
        if isinstance(node, yaml.SequenceNode):
            return [self.entry(item) for item in node.value]
        if not isinstance(node, yaml.MappingNode):
            return self._scalar(node)  # type: ignore[arg-type]
        mapping: dict[object, Entry] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.mistakes.append(f"{self._where(key_node)}: {_node_name(key_node)} cannot name a field")
                continue
            key = self._scalar(key_node)
            # The place of a field is the line of its name, which is where a reader looks.
            entry = Entry(self.entry(value_node).value, self._where(key_node))
            if key in mapping:
                self.mistakes.append(f"{entry.where}: key {key!r} is given twice, first at {mapping[key].where}")
            else:
                mapping[key] = entry
        return mapping

    def _scalar(self, node: yaml.ScalarNode) -> Hashable:
        try:
            value: Hashable = self.constructor.construct_object(node)
        except yaml.YAMLError:
            self.mistakes.append(f"{self._where(node)}: the tag {node.tag} is not known; leave it out")
            return str(node.value)
        except (ValueError, ArithmeticError):
            return str(node.value)  # what only looks like a date or a number is a text
        return value
