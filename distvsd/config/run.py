"""Where a run lives, how long it is, what is kept of it and what is reported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from distvsd.config.ranges import Count, PathText, Positive, Range


@dataclass(frozen=True)
class RunConfig:
    """Where the run lives and what makes its random numbers."""

    dir: Annotated[str, PathText()] = "runs/default"
    """The run directory itself, made if missing; relative to where the command is started."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    """Key of every random stream of the run."""
    init_from: str = ""
    """Another run's directory, or that of one of its stages: particles begin as the ones there ended. Empty: anew. The
    directory must stay where it is until this run, or its first stage, is done."""


@dataclass(frozen=True)
class ScheduleConfig:
    """How long the run is."""

    rounds: Positive = 1000
    """Rounds; in each one every particle moves once, or with particles.resident those whose turn it is."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept for resuming."""

    every: Count = 500
    """Rounds between checkpoints; 0 is only at the end."""
    keep: Annotated[int, Range(2, 10**9)] = 2
    """Newest complete checkpoints kept on disk; two, so that one is left when the newest is found damaged."""
    asynchronous: bool = True
    """Files are written while the next rounds run; the run stops only for the copy to the host. With
    particles.resident the run waits instead: there is no room for copies of all particles."""
    max_failures: Positive = 3
    """Saves that may fail one after another (full disk, I/O errors) before the run ends."""


@dataclass(frozen=True)
class LogConfig:
    """What is reported while training."""

    every: Positive = 10
    """Rounds between lines of metrics.jsonl."""
    images_every: Count = 0
    """Rounds between contact sheets; 0 is only at the end."""
    profile: Annotated[int, Range(0, 100)] = 0
    """Rounds that are recorded into `profile/` of the run directory, after the first three of a process: a trace that
    opens in Perfetto, and a table of phases with their heaviest operators. 0 is none. Recorded rounds are slower."""
    profile_ranks: Literal["first", "all"] = "first"
    """Which ranks record."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Whether metrics also go to Weights and Biases; online falls back to offline where it does not answer."""
    wandb_project: str = "distvsd"
    """Project in Weights and Biases."""
    wandb_name: str = ""
    """Name of the run there; empty is the name of run.dir."""
    wandb_group: str = ""
    """Group of the run there, such as a sweep."""
