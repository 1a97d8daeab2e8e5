"""YAML text, and `key=value` overrides, as values that remember where they were written."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

import yaml

from distvsd.config.scalars import SHOWN, Unread, printable, read_scalar, unknown_tag
from distvsd.errors import ConfigError

_COLLECTIONS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
# Limits on the reader's time and memory. A configuration that the program writes is always within them.
MAX_BYTES = 16 * 2**20
MAX_VALUES = 40_000  # scalars, lists and mappings, keys too
MAX_DEPTH = 32  # lists and mappings in each other
PATH_SHOWN = 300  # characters of a path in a message


@dataclass(frozen=True)
class Entry:
    """One value and its place, `FILE:LINE` or `override key=value`.

    value: what `read_scalar` gives, a list of entries, or a mapping from keys to entries.
    """

    value: object
    where: str


def read_document(path: Path, mistakes: list[str]) -> Entry:
    """The mapping in a file; duplicate keys are added to `mistakes`. Raises ConfigError if there is nothing to read."""
    text, name = _read_text(path), shown_path(path)
    node = _compose(text, name)
    if node is None:
        raise ConfigError(f"{name} is empty; a configuration is a mapping such as `prompt: a red cube`")
    entry = _Reader(name, mistakes).entry(node)
    if not isinstance(entry.value, dict):
        held = entry.value.said if isinstance(entry.value, Unread) else _node_name(node)
        raise ConfigError(
            f"{entry.where}: the file holds {held}, not a mapping; "
            "a configuration is a mapping such as `prompt: a red cube`"
        )
    return entry


def read_override(text: str, mistakes: list[str]) -> Entry | None:
    """`a.b=value` as the mapping {a: {b: value}}; None, and a mistake, if it is not of this form."""
    key, equals, value = text.partition("=")
    names = key.strip().split(".")
    where = f"override {printable(text, 80)}"
    if not equals or not all(names) or len(names) > MAX_DEPTH:
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


def shown_path(path: Path) -> str:
    """A path as messages name it."""
    return printable(str(path), PATH_SHOWN)


def plain_entry(value: object, where: str) -> Entry:
    """Plain data as an entry. JSON writes a schedule's rounds as texts; a numeric key is a round, never a field."""
    if isinstance(value, dict):
        return Entry({_round_or_name(key): plain_entry(item, where) for key, item in value.items()}, where)
    return Entry([plain_entry(item, where) for item in value] if isinstance(value, list) else value, where)


def _round_or_name(key: object) -> object:
    return int(key) if isinstance(key, str) and re.fullmatch(r"\d{1,4000}", key, re.ASCII) else key


def _read_text(path: Path) -> str:
    data, name = _read_bytes(path), shown_path(path)
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{name} has more than {MAX_BYTES >> 20} MiB, the most of a configuration file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{name}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8 text"
        ) from error


def _read_bytes(path: Path) -> bytes:
    """The first `MAX_BYTES` + 1 bytes of the file. Only a regular file is opened: a pipe or a device may block the
    reader, or never end."""
    name = shown_path(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            with open(path, "rb", opener=_opened_at_once) as stream:
                return stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{name} does not exist; give the path of a configuration file") from None
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{name} cannot be the path of a file: {error}") from error
    kind = "a directory" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
    raise ConfigError(f"{name} is {kind}, not a configuration file; give the YAML file itself")


def _opened_at_once(path: str, flags: int) -> int:
    """Opens without blocking, even if a pipe has replaced the file since its kind was checked."""
    return os.open(path, flags | os.O_NONBLOCK)


def _node_name(node: yaml.Node) -> str:
    match node:
        case yaml.MappingNode():
            return "a mapping"
        case yaml.SequenceNode():
            return "a list"
    return "a single value"


class _TooMuch(Exception):
    """A document beyond the limits of this file: what is too much, and in which line, from 0."""


class _Loader(yaml.SafeLoader):
    """Stops composing at the limits: each level of nesting takes stack, each value takes memory and time."""

    depth = values = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        self.values += 1
        line = self.peek_event().start_mark.line
        if self.depth > MAX_DEPTH:
            raise _TooMuch(f"is nested too deeply; allowed: {MAX_DEPTH} levels", line)
        if self.values > MAX_VALUES:
            raise _TooMuch(f"holds too many values; allowed: {MAX_VALUES}", line)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _compose(text: str, name: str | None) -> yaml.Node | None:
    """The node graph of one YAML document; None if it holds nothing. name: the file, None for an override."""

    def place(line: int) -> str:
        return f"{name}:{line + 1}: " if name else ""

    if len(text) > MAX_BYTES:
        raise ConfigError(f"has {len(text)} characters; allowed: {MAX_BYTES}")
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        code = error.character
        if 0xDC80 <= code <= 0xDCFF:  # how Python represents a byte of the command line that is not UTF-8
            raise ConfigError(f"byte 0x{code - 0xDC00:02x} is not UTF-8; give the text as UTF-8") from error
        raise ConfigError(
            f"{place(text.count(chr(10), 0, error.position))}is not YAML: character U+{code:04X} is not allowed; "
            "write it as an escape in double quotes"
        ) from error
    try:
        return loader.get_single_node()
    except _TooMuch as error:
        problem, line = error.args
        raise ConfigError(f"{place(line)}{problem}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = printable(str(error.problem or error.context), 200)
        raise ConfigError(
            f"{place(mark.line) if mark else ''}is not YAML: {problem}; quote texts that hold : # [ {{"
        ) from error
    except (ValueError, OverflowError) as error:  # from chr and int: the scanner passes them any digits
        raise ConfigError(
            f"{place(loader.get_mark().line)}is not YAML: an escape above U+10FFFF, or the number of a %YAML version "
            "of thousands of digits"
        ) from error


class _Reader:
    """Turns nodes into entries; aliases are shared, never copied, so a small file stays small."""

    def __init__(self, name: str | None, mistakes: list[str], override: str = "") -> None:
        self.name, self.mistakes, self.override = name, mistakes, override
        self.done: dict[int, Entry] = {}
        self.open: set[int] = set()

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
        if isinstance(node, yaml.ScalarNode):
            return read_scalar(node.tag, node.value)
        if node.tag not in _COLLECTIONS:
            return unknown_tag(node.tag)
        if isinstance(node, yaml.SequenceNode):
            return [self.entry(item) for item in node.value]
        mapping: dict[object, Entry] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.mistakes.append(f"{self._where(key_node)}: {_node_name(key_node)} cannot name a field")
                continue
            key = read_scalar(key_node.tag, key_node.value)
            # The place of a field is the line of its name, which is where a reader looks.
            entry = Entry(self.entry(value_node).value, self._where(key_node))
            if key in mapping:
                shown = printable(key_node.value, SHOWN)
                self.mistakes.append(f"{entry.where}: key '{shown}' is given twice, first at {mapping[key].where}")
            else:
                mapping[key] = entry
        return mapping
