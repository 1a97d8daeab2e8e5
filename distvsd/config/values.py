"""From an entry to a typed value, driven by the annotation of the field: types, ranges, nearest names."""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from distvsd.config.document import Entry
from distvsd.config.ranges import FolderName, Increasing, PathText, Range
from distvsd.config.scalars import SHOWN, Unread, printable, quoted
from distvsd.config.schedule import Schedule

# These keep a configuration that the program writes within the limits of `document.py`, whatever the characters.
MAX_TEXT = 100_000  # characters of one text
MAX_PROMPTS, MAX_PROMPT_CHARACTERS = 20_000, 1_000_000  # of a list of prompts
MAX_POINTS = 1000  # of a schedule


class Mistake(Exception):
    """A value that its field cannot take; the text says what is allowed. Stays inside this package."""


def convert(entry: Entry, annotation: Any) -> object:
    """The value as the annotation's type. Raises Mistake."""
    marks: tuple[object, ...] = ()
    if get_origin(annotation) is Annotated:
        annotation, *rest = get_args(annotation)
        marks = tuple(rest)
    allowed = next((mark for mark in marks if isinstance(mark, Range)), Range())
    if annotation is Schedule:
        return _schedule(entry.value, allowed)
    if get_origin(annotation) is Literal:
        return _choice(entry.value, get_args(annotation))
    if get_origin(annotation) is tuple:
        return _pair(entry.value, allowed, any(isinstance(mark, Increasing) for mark in marks))
    if get_origin(annotation) in (Union, types.UnionType):
        return _number_or_word(entry.value, annotation, allowed) if int in get_args(annotation) else _texts(entry.value)
    if annotation is str:
        return _text(entry.value, marks)
    if annotation is bool:
        if not isinstance(entry.value, bool):
            raise Mistake(f"is {named(entry.value)}; allowed: true, false")
        return entry.value
    if annotation in (int, float):
        return _number(entry.value, annotation, allowed)
    raise TypeError(f"fields of type {annotation} are not supported; add the conversion here")


def named(value: object) -> str:
    """A value as a message shows it: short, with its type where that is the mistake."""
    match value:
        case None:
            return "nothing"
        case bool():
            return f"the truth value {str(value).lower()}"
        case int() | float():
            return printable(str(value), SHOWN)
        case str():
            return f"the text {quoted(value)}"
        case Unread():
            return value.said
        case list():
            return f"a list of {len(value)}"
        case dict():
            return "a mapping"
        case _:
            return f"a {type(value).__name__}"


def nearest(name: str, known: Sequence[str]) -> str:
    """The known name most like this one, or an empty text."""
    if len(name) > 100:  # no known name is that long, and comparing takes time
        return ""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return found[0] if found else ""


def _number(value: object, kind: type, allowed: Range) -> float:
    number = value
    if kind is float and isinstance(value, str):
        number = _float_text(value)  # YAML 1.1 reads 1e-3 as a text, because it wants a dot in a number
    if isinstance(number, bool) or not isinstance(number, int if kind is int else (int, float)):
        raise Mistake(f"is {named(value)}; {_allowed(kind, allowed)}")
    if not math.isfinite(number):
        raise Mistake(f"is not finite; {_allowed(kind, allowed)}")
    if not allowed.holds(number):
        raise Mistake(f"is {named(number)}; {_allowed(kind, allowed)}")
    return int(number) if kind is int else float(number)


def _number_or_word(value: object, annotation: Any, allowed: Range) -> float | str:
    """annotation: `int | Literal[...]`."""
    words = [word for part in get_args(annotation) for word in get_args(part)]
    if isinstance(value, str) and value in words:
        return value
    try:
        return _number(value, int, allowed)
    except Mistake as mistake:
        raise Mistake(f"{mistake}, or {', '.join(words)}") from None


def _float_text(text: str) -> object:
    try:
        return float(text)
    except ValueError:
        return text


def _allowed(kind: type, allowed: Range) -> str:
    noun = "an integer" if kind is int or allowed.integer else "a number"
    return f"allowed: {noun} {allowed.describe()}".rstrip()


def _choice(value: object, choices: tuple[str, ...]) -> str:
    if isinstance(value, bool) and "off" in choices and not value:
        return "off"  # YAML 1.1 reads a bare off as false
    if not isinstance(value, str) or value not in choices:
        close = nearest(value, choices) if isinstance(value, str) else ""
        hint = f"; did you mean {close!r}?" if close else ""
        known = f"known is {choices[0]!r}" if len(choices) == 1 else f"allowed: {', '.join(choices)}"
        raise Mistake(f"is {named(value)}; {known}{hint}")
    return value


def _text(value: object, marks: Sequence[object] = ()) -> str:
    if not isinstance(value, str):
        is_plain = value.is_plain if isinstance(value, Unread) else isinstance(value, bool | int | float)
        hint = '; write "" for the empty one' if value is None else "; put it in quotes" if is_plain else ""
        raise Mistake(f"is {named(value)}; allowed: a text{hint}")
    if len(value) > MAX_TEXT:
        raise Mistake(f"is a text of {len(value)} characters; allowed: at most {MAX_TEXT}")
    if any(isinstance(mark, PathText) for mark in marks) and (not value or "\0" in value):
        raise Mistake(
            f"is {named(value) if value else 'empty'}; allowed: a path of at least one character, without NUL"
        )
    if any(isinstance(mark, FolderName) for mark in marks) and not re.fullmatch("[a-z0-9][a-z0-9_-]{0,39}", value):
        raise Mistake(f"is {named(value)}; allowed: 1 to 40 lower-case letters, digits, - and _, no sign first")
    return value


def _texts(value: object) -> str | tuple[str, ...]:
    if not isinstance(value, list):
        return _text(value)
    if not 1 <= len(value) <= MAX_PROMPTS:
        size = f"a list of {len(value)}" if value else "an empty list"
        raise Mistake(f"is {size}; give one text, or one per particle, at most {MAX_PROMPTS}")
    texts = []
    for number, item in enumerate(value):
        try:
            texts.append(_text(item.value))
        except Mistake as mistake:
            raise Mistake(f"entry {number} ({item.where}) {mistake}") from None
    if sum(map(len, texts)) > MAX_PROMPT_CHARACTERS:
        raise Mistake(f"has {sum(map(len, texts))} characters in its entries; allowed: at most {MAX_PROMPT_CHARACTERS}")
    return texts[0] if len(texts) == 1 else tuple(texts)


def _pair(value: object, allowed: Range, increasing: bool) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise Mistake(f"is {named(value)}; allowed: two numbers in a list, each {allowed.describe()}")
    first, second = (_number(item.value, float, allowed) for item in value)
    if increasing and first > second:
        raise Mistake(f"is [{first:g}, {second:g}]; the first number must not be larger than the second")
    return first, second


def _schedule(value: object, allowed: Range) -> Schedule:
    if not isinstance(value, dict):
        return Schedule.constant(_number(value, float, allowed))
    kind: Literal["step", "linear"] = "step"
    if list(value) in (["linear"], ["step"]):
        kind = "linear" if "linear" in value else "step"
        value = value[kind].value
    if not isinstance(value, dict) or not value:
        raise Mistake(
            f"is {named(value)}; a schedule is a number, {{0: 0.98, 5000: 0.5}}, or {{linear: {{0: 64, 5000: 512}}}}"
        )
    if len(value) > MAX_POINTS:
        raise Mistake(f"has {len(value)} points; allowed: at most {MAX_POINTS}, and `linear` draws lines between them")
    points = []
    for round, item in value.items():
        if isinstance(round, bool) or not isinstance(round, int) or round < 0:
            raise Mistake(f"has a point at {named(round)}; allowed: rounds, integers at least 0, or one key `linear`")
        try:
            points.append((round, _number(item.value, float, allowed)))
        except Mistake as mistake:
            raise Mistake(f"at round {named(round)} {mistake}") from None
    points.sort()
    if points[0][0] != 0:
        raise Mistake(f"begins at round {named(points[0][0])}; a schedule needs a point at round 0")
    return Schedule(tuple(points), kind if len(points) > 1 else "step")
