"""A number that changes over the rounds of a run."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """A number that depends on the round: a step or a linear function of it.

    YAML: `0.5`, `{0: 0.98, 5000: 0.5}` for steps, `{linear: {0: 64, 5000: 512}}`. points: (round, value),
    rounds increasing from 0. A step holds until the next point; linear interpolates between points; both keep the last
    value for ever.
    """

    points: tuple[tuple[int, float], ...]
    kind: Literal["step", "linear"] = "step"

    @staticmethod
    def constant(value: float) -> Schedule:
        return Schedule(((0, float(value)),))

    def at(self, round: int) -> float:
        """The value in this round; rounds count from 0."""
        last = max(bisect.bisect_right(self.points, round, key=lambda point: point[0]) - 1, 0)
        start, value = self.points[last]
        if self.kind == "step" or last + 1 == len(self.points):
            return value
        end, target = self.points[last + 1]
        return value + (target - value) * (round - start) / (end - start)
