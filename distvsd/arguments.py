"""What the commands of the command line have in common: how one is described, and the types of their arguments, which
turn a word into a value or refuse it with what is allowed."""

from __future__ import annotations

import argparse
import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import Any, Final

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


def whole_numbers(low: int, high: int) -> Callable[[str], tuple[int, ...]]:
    """Whole numbers within these limits, with commas between them."""
    read = whole(low, high)
    return lambda word: tuple(read(part.strip()) for part in word.split(","))


def nothing_or(read: Callable[[str], int]) -> Callable[[str], int]:
    """0, or what `read` accepts."""
    return lambda word: 0 if word == "0" else read(word)


def command_parser(
    kinds: Any, name: str, does: str, example: str, run: Callable[[argparse.Namespace], int], parent: str = ""
) -> argparse.ArgumentParser:
    """A command with its help. kinds: what `add_subparsers` gave. does: in the imperative, without a full stop.
    example: what follows the command in its help. run: gets the parsed arguments and returns the exit code."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        name,
        help=does,
        description=does[0].upper() + does[1:] + ".",
        epilog=f"example: distvsd {parent}{name} {example}".rstrip(),
        allow_abbrev=False,
    )
    parser.set_defaults(command=run, parser=parser)
    return parser


def json_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --json."""
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


# These limits catch typing mistakes; no real use exceeds them.
NODES: Final = whole(1, 10**6)
RANKS_A_NODE: Final = whole(1, 1024)
ASSUMPTION: Final = number(1e-9, 1e9)
SAMPLES: Final = whole(1, 10_000)
GUIDANCE: Final = number(0, 1000)
STEPS: Final = whole(1, 10**9)
IMAGES: Final = whole(1, 10**7)
SEED: Final = whole(0, 2**63 - 1)
PARTICLES: Final = whole_numbers(0, 2**31 - 2)
TEXTURE: Final = nothing_or(whole(64, 8192))
GRID: Final = whole(8, 256)
DENSITY: Final = number(1e-9, 1e6)
LEARNING_RATE: Final = number(1e-9, 10)
