"""A scalar of YAML as a value, and texts as a message shows them.

Scalars are built here from the core tags alone: PyYAML's own constructors raise whatever Python raises for a text that
does not fit its tag.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass

MAX_NUMBER = 100  # characters; far fewer than an integer that Python refuses to print, or one too large for a float
SHOWN = 60  # characters of a text in a message

_CORE = "tag:yaml.org,2002:"
_NULLS = frozenset(("", "~", "null"))
_BOOLS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
# Numbers of YAML 1.1 in lower case, without their sign and underscores; 1:30 is 90.
_INTEGER = re.compile(r"0b[01]+|0x[0-9a-f]+|0[0-7]*|[1-9][0-9]*(?::[0-5]?[0-9])*", re.ASCII)
_FLOAT = re.compile(r"\.inf|\.nan|(?:[0-9]+(?::[0-5]?[0-9])*\.?[0-9]*|\.[0-9]+)(?:e[-+]?[0-9]+)?", re.ASCII)


@dataclass(frozen=True)
class Unread:
    """A value that no field takes. said: the value in words, such as "the date 2026-11-23". is_plain: in quotes it
    would be a text."""

    said: str
    is_plain: bool = False


def read_scalar(tag: str, text: str) -> Hashable:
    """The value of a scalar with this tag, implicit or written: a text, a number, a truth value, None, or `Unread`."""
    if not text.isascii():
        try:
            # JSON, and so YAML in double quotes, may write a character above U+FFFF as a pair of surrogates.
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        except UnicodeDecodeError:
            return Unread(f"the text {quoted(text)}, in which a lone surrogate is no character")
    name = tag.removeprefix(_CORE)
    match name:
        case "str" | "value" | "merge":
            return text
        case "null" if text.lower() in _NULLS:
            return None
        case "bool" if text.lower() in _BOOLS:
            return _BOOLS[text.lower()]
        case "int" | "float" if len(text) > MAX_NUMBER:
            return Unread(f"the number {printable(text, 20)} of {len(text)} characters", is_plain=True)
        case "int" | "float":
            number = _number(text, name == "int")
            if number is not None:
                return number
        case "timestamp" if re.match(r"\d", text):
            return Unread(f"the date {printable(text, SHOWN)}", is_plain=True)
        case "null" | "bool" | "timestamp":
            pass
        case _:
            return unknown_tag(tag)
    return Unread(f"the text {quoted(text)}, which does not fit the tag !!{name} (leave the tag out)")


def unknown_tag(tag: str) -> Unread:
    """A value whose tag is none of the core ones."""
    return Unread(f"a value with the tag {printable(tag, SHOWN)}, which is not known (leave it out)")


def printable(text: str, most: int | None = None) -> str:
    """The text as a terminal may show it: one line, control and direction marks as escapes, shortened to `most`."""
    cut = text if most is None or len(text) <= most else text[:most] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)


def quoted(text: str) -> str:
    """The text between quotes, shortened, with everything escaped that is not printable."""
    return f"{text[:SHOWN]!r}" + ("..." if len(text) > SHOWN else "")


def _number(text: str, is_integer: bool) -> float | None:
    """None where the text is not a number of this kind."""
    plain = text.replace("_", "").lower()
    sign = -1 if plain.startswith("-") else 1
    digits = plain[1:] if plain.startswith(("-", "+")) else plain
    if not (_INTEGER if is_integer else _FLOAT).fullmatch(digits):
        return None
    if not is_integer:
        parts = [float(part) for part in digits.replace(".inf", "inf").replace(".nan", "nan").split(":")]
    else:
        base = {"0b": 2, "0x": 16}.get(digits[:2], 8 if digits.startswith("0") else 10)
        parts = [int(part, base) for part in digits.split(":")]
    value = parts[0]
    for part in parts[1:]:
        value = 60 * value + part
    return sign * value
