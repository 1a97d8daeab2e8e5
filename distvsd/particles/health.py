"""The health of particles: who skips a round, who goes back to its last good state, who is given up.

A particle that is not finite costs itself a round and nobody else anything. One that stays so is put back to where it
last was good, and moves more slowly from there; one that keeps failing is quarantined, so that a run of thousands does
not end because of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from distvsd.errors import CheckpointError
from distvsd.vsd.wanted import MOST

Verdict = Literal["healthy", "unhealthy", "restore", "quarantine"]


class HealthOptions(Protocol):
    """What is read of the configuration's `particles.health` block; meanings and ranges are documented there."""

    @property
    def max_bad(self) -> int: ...
    @property
    def max_restores(self) -> int: ...
    @property
    def restore_rate(self) -> float: ...


@dataclass(frozen=True)
class DefaultHealth:
    """The configuration's defaults, for ensembles that are made without a configuration."""

    max_bad: int = 10
    max_restores: int = 2
    restore_rate: float = 0.5


@dataclass
class Health:
    """One particle's record, kept in the checkpoint's manifest.

    bad: rounds in a row that it has skipped. total: rounds it has skipped since the run began. restores: times it was
    put back. quarantined: it takes no part any more.
    """

    bad: int = 0
    total: int = 0
    restores: int = 0
    quarantined: bool = False

    def judge(self, moved: bool, options: HealthOptions) -> Verdict:
        """Counts one round of a particle that is not quarantined, and says what is to be done with it.

        After `restore` and `quarantine` the caller puts the last good state back.
        """
        if moved:
            self.bad = 0
            return "healthy"
        self.bad += 1
        self.total += 1
        if self.bad < options.max_bad:
            return "unhealthy"
        self.bad = 0
        if self.restores < options.max_restores:
            self.restores += 1
            return "restore"
        self.quarantined = True
        return "quarantine"

    def rate(self, options: HealthOptions) -> float:
        """The factor on its learning rates: exactly 1 for a particle that was never put back."""
        return float(options.restore_rate**self.restores)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(record: Mapping[str, Any] | None, rounds: int = MOST) -> Health:
        """Inverse of `to_json`; what is missing has its initial value, so that manifests without health can be read.

        rounds: completed when it was saved; every count is of rounds. Raises CheckpointError for a value that no
        particle can have.
        """
        initial = asdict(Health())
        values = {name: (record or {}).get(name, value) for name, value in initial.items()}
        for name, value in values.items():
            kind = type(initial[name])
            if type(value) is not kind or (kind is int and not 0 <= value <= rounds):
                wanted = "true or false" if kind is bool else f"an integer from 0 to {rounds}"
                raise CheckpointError(
                    f"the manifest says {name} = {shown(value)} of a particle's health, which must be {wanted}; the "
                    "checkpoint was altered: delete it to go on from an older one"
                )
        return Health(**values)


def shown(value: object) -> str:
    """A value of a manifest as a message shows it: short, whatever it is."""
    return f"a {type(value).__name__}" if isinstance(value, list | dict) else f"{value!r:.40}"


@dataclass(frozen=True)
class Update:
    """What one round did to this rank's particles, as ids.

    healthy: moved. unhealthy: something of theirs was not finite, or their rank had no memory; they kept their state
    this round. crowded_out: those of the unhealthy for whom there was no memory. restored, quarantined: those of the
    unhealthy that were put back, or given up, in this round. absent: everyone who did not move, which adds those
    quarantined before; they must not train the score network either.
    """

    healthy: list[int] = field(default_factory=list)
    unhealthy: list[int] = field(default_factory=list)
    crowded_out: list[int] = field(default_factory=list)
    restored: list[int] = field(default_factory=list)
    quarantined: list[int] = field(default_factory=list)
    absent: list[int] = field(default_factory=list)
