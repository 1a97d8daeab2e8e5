"""The health of particles: which ones skip a round, go back to their last good state, or are quarantined.

A particle that is not finite skips the round; the others do not notice. After too many bad rounds it is put back to its
last good state and moves more slowly from there. One that keeps failing is quarantined, so that a run of thousands does
not end because of one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from distvsd.config import HealthConfig
from distvsd.errors import CheckpointError
from distvsd.vsd.wanted import MOST

Verdict = Literal["healthy", "unhealthy", "restore", "quarantine"]


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

    def judge(self, moved: bool, config: HealthConfig) -> Verdict:
        """Counts one round of a particle that is not quarantined, and says what is to be done with it.

        After `restore` and `quarantine` the caller puts the last good state back.
        """
        if moved:
            self.bad = 0
            return "healthy"
        self.bad += 1
        self.total += 1
        if self.bad < config.max_bad:
            return "unhealthy"
        self.bad = 0
        if self.restores < config.max_restores:
            self.restores += 1
            return "restore"
        self.quarantined = True
        return "quarantine"

    def rate(self, config: HealthConfig) -> float:
        """The factor on its learning rates: exactly 1 for a particle that was never put back."""
        return float(config.restore_rate**self.restores)

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
    """What one round did to this rank's active particles, as ids.

    healthy: moved. unhealthy: kept their state, because something of theirs was not finite or because there was no
    memory. out_of_memory: those of the unhealthy for which there was no memory. restored, quarantined: those of the
    unhealthy that were put back, or quarantined, in this round. absent: all that did not move, which adds those that
    were quarantined before; they must not train the score network either. found_again, set_back: whose numbers were
    lost on the disk and are the same again, or are those of an older state; they may be any of this rank's.
    """

    healthy: list[int] = field(default_factory=list)
    unhealthy: list[int] = field(default_factory=list)
    out_of_memory: list[int] = field(default_factory=list)
    restored: list[int] = field(default_factory=list)
    quarantined: list[int] = field(default_factory=list)
    absent: list[int] = field(default_factory=list)
    found_again: list[int] = field(default_factory=list)
    set_back: list[int] = field(default_factory=list)

    def __add__(self, other: Update) -> Update:
        """What two updates of different particles did."""
        return Update(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(Update)))


def judge(
    records: Mapping[int, Health], moved: Collection[int], out_of_memory: Collection[int], config: HealthConfig
) -> Update:
    """Brings the records of one round's particles up to date.

    The caller puts those in `restored` and `quarantined` back to their last good state.
    """
    update = Update()
    for particle_id, health in records.items():
        if particle_id not in moved:
            update.absent.append(particle_id)
        if health.quarantined:
            continue
        verdict = health.judge(particle_id in moved, config)
        (update.healthy if verdict == "healthy" else update.unhealthy).append(particle_id)
        if verdict != "healthy" and particle_id in out_of_memory:
            update.out_of_memory.append(particle_id)
        if verdict == "restore":
            update.restored.append(particle_id)
        if verdict == "quarantine":
            update.quarantined.append(particle_id)
    return update
