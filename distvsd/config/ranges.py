"""What a field's annotation says beside its type: which values are allowed; and the types that fields share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal


@dataclass(frozen=True)
class Range:
    """Allowed values of a number, of each number in a list, or of each value in a schedule.

    low, high: limits, themselves allowed unless `above` or `below` says otherwise. multiple_of: 0 for any value.
    integer: a schedule's values must be whole numbers (a plain field says so by its type).
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    multiple_of: int = 0
    integer: bool = False

    def holds(self, value: float) -> bool:
        low_ok = value > self.low if self.above else value >= self.low
        high_ok = value < self.high if self.below else value <= self.high
        whole = not self.integer or value == int(value)
        return low_ok and high_ok and whole and (not self.multiple_of or value % self.multiple_of == 0)

    def describe(self) -> str:
        """The range in words, such as "above 0, at most 1"; empty where nothing is excluded."""
        parts = []
        if self.low > -math.inf:
            parts.append(f"{'above' if self.above else 'at least'} {_shown(self.low)}")
        if self.high < math.inf:
            parts.append(f"{'below' if self.below else 'at most'} {_shown(self.high)}")
        if self.multiple_of:
            parts.append(f"a multiple of {self.multiple_of}")
        return ", ".join(parts)


def _shown(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


@dataclass(frozen=True)
class Increasing:
    """Marks a pair whose first number must not be larger than its second."""


@dataclass(frozen=True)
class PathText:
    """Marks a text that names a file or a folder: at least one character, none of them NUL."""


@dataclass(frozen=True)
class FolderName:
    """Marks a text that becomes the name of a folder: 1 to 40 lower-case letters, digits, - and _, no sign first."""


Count = Annotated[int, Range(0, 10**9)]
Measured = Annotated[int | Literal["auto"], Range(0, 10**9)]  # auto: chosen in the first rounds
Positive = Annotated[int, Range(1, 10**9)]
Share = Annotated[float, Range(0, 1)]
Weight = Annotated[float, Range(low=0)]
Rate = Annotated[float, Range(0, 10, above=True)]
Betas = Annotated[tuple[float, float], Range(0, 1, below=True)]
Angles = Annotated[tuple[float, float], Range(-360, 360), Increasing()]
