"""Types of the command line's arguments: what argparse turns a word into, or refuses with what is allowed."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import Final

from distvsd.config.scalars import printable, quoted

DIGITS: Final = 40  # of a number in a message


def whole(low: int, high: int) -> Callable[[str], int]:
    """A whole number in decimal digits within these limits."""

    def read(word: str) -> int:
        if not re.fullmatch(r"[-+]?[0-9]+", word):
            raise ArgumentTypeError(f"{quoted(word)} is not a whole number")
        if len(word) > DIGITS or not low <= int(word) <= high:
            raise ArgumentTypeError(f"{printable(word, DIGITS)} is not at least {low} and at most {high}")
        return int(word)

    return read


def number(low: float, high: float) -> Callable[[str], float]:
    """A number within these limits."""

    def read(word: str) -> float:
        try:
            value = float(word)
        except ValueError:
            raise ArgumentTypeError(f"{quoted(word)} is not a number") from None
        if not low <= value <= high:  # also refuses nan
            raise ArgumentTypeError(f"{printable(word, DIGITS)} is not at least {low:g} and at most {high:g}")
        return value

    return read


def text(word: str) -> str:
    """Any text; refuses bytes of the command line that are not UTF-8."""
    try:
        word.encode()
    except UnicodeEncodeError:
        raise ArgumentTypeError(f"{quoted(word)} holds bytes that are not UTF-8") from None
    return word


# These limits catch typing mistakes; no real use exceeds them.
NODES: Final = whole(1, 10**6)
RANKS_A_NODE: Final = whole(1, 1024)
ASSUMPTION: Final = number(1e-9, 1e9)
SAMPLES: Final = whole(1, 10_000)
GUIDANCE: Final = number(0, 1000)
STEPS: Final = whole(1, 10**9)
IMAGES: Final = whole(1, 10**7)
SEED: Final = whole(0, 2**63 - 1)
LEARNING_RATE: Final = number(1e-9, 10)
