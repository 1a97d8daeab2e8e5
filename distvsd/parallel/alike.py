"""Compares, once before a run begins, what all ranks must have in common. Ranks that differ would train on silently."""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

from distvsd.errors import ConfigError
from distvsd.parallel.collectives import gather_objects
from distvsd.parallel.world import World


class Fact(NamedTuple):
    """What one rank found. value: must be the same on every rank. shown: its description in messages; may differ."""

    value: str
    shown: str


def refuse_unlike(world: World, facts: dict[str, Fact]) -> None:
    """Raises the same ConfigError on all ranks if they differ in a value. Collective.

    facts: by name; the same names on every rank.
    """
    given = [{name: Fact(*fact) for name, fact in of_rank.items()} for of_rank in gather_objects(world, facts)]
    differing = [name for name in facts if len({of_rank[name].value for of_rank in given}) > 1]
    if differing:
        raise ConfigError(
            f"ranks differ where they must agree: {'; '.join(_by_rank(name, given) for name in differing)}. "
            "Give every node the same files and the same installation; a relative path is another folder on every rank "
            "that has another working directory"
        )


def _by_rank(name: str, given: list[dict[str, Fact]]) -> str:
    """For example "the prior is X on ranks 0-2, 5, Y on rank 3"."""
    ranks: dict[str, list[int]] = {}
    for rank, of_rank in enumerate(given):
        ranks.setdefault(of_rank[name].value, []).append(rank)
    parts = [
        f"{given[of[0]][name].shown} on {'rank' if len(of) == 1 else 'ranks'} {_ranges(of)}" for of in ranks.values()
    ]
    return f"the {name} is {', '.join(parts)}"


def _ranges(numbers: list[int]) -> str:
    """For example "0-2, 5" for 0, 1, 2, 5."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda item: item[1] - item[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
