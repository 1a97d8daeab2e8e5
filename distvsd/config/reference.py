"""The reference of all fields, taken from the schema itself: type, range, default and the text below each field."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import sys
import textwrap
import types
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from distvsd.config.canonical import to_dict
from distvsd.config.load import dotted_keys, hints, is_section
from distvsd.config.ranges import Increasing, PathText, Range
from distvsd.config.schedule import Schedule
from distvsd.config.schema import Config
from distvsd.config.stages import StageConfig


@dataclasses.dataclass(frozen=True)
class FieldReference:
    """One field: dotted key, what it accepts in words, its default as plain data, what it means."""

    key: str
    accepts: str
    default: Any
    meaning: str


def fields_reference() -> list[FieldReference]:
    """All fields in the order of the schema, sections themselves left out."""
    rows = []
    defaults = to_dict(Config())
    for key in dotted_keys():
        section: type = Config
        default: Any = defaults
        *outer, name = key.split(".")
        for part in outer:
            section, default = hints(section)[part], default[part]
        annotation = hints(section)[name]
        if not is_section(annotation):
            meaning = field_docs(section).get(name, "")
            rows.append(FieldReference(key, _accepts(annotation), default.get(name, []), meaning))
    return rows


def print_reference() -> str:
    """The reference as text, a field a paragraph."""
    paragraphs = []
    for row in fields_reference():
        default = "" if row.default is None else f", default {row.default!r}"
        paragraphs.append(f"{row.key}\n    {row.meaning}\n    {row.accepts}{default}\n")
    return "\n".join(paragraphs)


@cache
def field_docs(section: type) -> dict[str, str]:
    """Texts that stand below the fields of a section, read from the source, as Python itself does not keep them."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(sys.modules[section.__module__])))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == section.__name__)
    docs = {}
    for field, below in itertools.pairwise(body):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            docs[field.target.id] = inspect.cleandoc(str(below.value.value))
    return docs


def _accepts(annotation: Any) -> str:
    marks: tuple[Any, ...] = ()
    if get_origin(annotation) is Annotated:
        annotation, *rest = get_args(annotation)
        marks = tuple(rest)
    limits = ", ".join(filter(None, (_limit(mark) for mark in marks)))
    return f"{_noun(annotation)} {limits}".strip()


def _noun(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(get_args(annotation))
    if annotation == tuple[StageConfig, ...]:
        return "list of stages"
    if get_origin(annotation) is tuple:
        return "two numbers, each"
    if get_origin(annotation) in (Union, types.UnionType):
        return "text, or a list of texts"
    nouns: dict[type, str] = {
        str: "text",
        bool: "true | false",
        int: "integer",
        float: "number",
        Schedule: "schedule of numbers",
    }
    return nouns[annotation]


def _limit(mark: Any) -> str:
    match mark:
        case Range():
            return mark.describe()
        case Increasing():
            return "first not larger than second"
        case PathText():
            return "of at least one character"
        case _:
            return ""
