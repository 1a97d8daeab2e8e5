"""How many particles a rank moves in one go, and how many samples the score's training takes in one call of the UNet.

Both change what a round costs and not what it does. What is best depends on the machine, the particle and the
resolution, so `auto` tries sizes in the first rounds. All ranks take the same size, by the slowest of them.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from distvsd.config import Config
from distvsd.parallel.collectives import gather_objects
from distvsd.parallel.world import World
from distvsd.particles import Ensemble
from distvsd.run.loop import Round
from distvsd.runtime.memory import host_memory
from distvsd.score.training import ScoreTraining

BETTER = 0.97  # of the seconds of the best size so far: what a larger or smaller one must reach
ROUNDS = 3  # of a size; the fastest but the first counts, which is slower because memory is taken anew
MANY = 4  # calls of a round that are as good as several rounds
FULL = 0.8  # of a device's memory, which twice the memory of a size must not exceed for twice the size to be tried
PHASES = ("render", "encode", "objective", "update")  # those that go group by group


@dataclass
class Search:
    """Looks for the fastest of the sizes 1, 2, 4, ... and `most`: upwards from `size` while that helps, else downwards.

    seconds: of a round, by size. done: `size` is the answer.
    """

    most: int
    size: int = 8
    seconds: dict[int, float] = field(default_factory=dict)
    done: bool = False

    def __post_init__(self) -> None:
        self.size = min(self.size, self.most)

    def note(self, seconds: float, may_grow: bool) -> None:
        """What a round took with `size`, inf where it did not fit. Goes to the next size, or ends the search."""
        self.seconds[self.size] = seconds
        best = min(self.seconds, key=self.seconds.__getitem__)
        others = [other for size, other in self.seconds.items() if size != self.size]
        helps = all(seconds < BETTER * other for other in others)
        larger = min(2 * best, self.most)
        smaller = 2 ** ((best - 1).bit_length() - 1) if best > 1 else 0  # the next power of two below
        if best == self.size == max(self.seconds) and helps and may_grow and larger > best:
            self.size = larger
        elif best == min(self.seconds) and smaller and (helps or best != self.size):
            self.size = smaller
        else:
            self.size, self.done = best, True


class Sizes:
    """Sets the sizes of one rank's rounds. Every rank calls `after` once a round, in the same order.

    A size that the configuration gives is taken, and nothing is measured.
    """

    def __init__(self, config: Config, world: World, ensemble: Ensemble, training: ScoreTraining | None) -> None:
        self._world, self._ensemble, self._training = world, ensemble, training
        self._views = config.particles.views
        # Where the network is split over ranks, a round is one group.
        measured = config.parallel.numerics == "fast" and config.parallel.strategy == "flat"
        share = math.ceil(config.particles.active / world.size)
        trained = math.ceil(config.score.rows_a_step(config.particles.active, self._views) / self._views / world.size)
        find_particles = measured and config.particles.micro_batch == "auto"
        find_samples = measured and config.score.micro_batch == "auto" and training is not None
        self.particles = Search(share) if find_particles else None
        self.samples = Search(max(trained, 1)) if find_samples else None
        self._times: list[tuple[float, float]] = []
        self._before = _memory(world.device)
        self._apply()

    @property
    def measuring(self) -> bool:
        return any(search is not None and not search.done for search in (self.particles, self.samples))

    def entered(self, then: Callable[[int, str], None]) -> Callable[[int, str], None]:
        """`then`, for the loop; while sizes are measured it waits for the GPU, so that phases have their own time."""

        def enter(step: int, phase: str) -> None:
            if self.measuring and self._world.device.type == "cuda":
                torch.cuda.synchronize(self._world.device)
            then(step, phase)

        return enter

    def after(self, done: Round) -> str | None:
        """Takes note of a round, and says what was chosen when it ends the search; communicates while sizes are
        measured."""
        if not self.measuring:
            return None
        grouped = sum(done.seconds.get(phase, 0.0) for phase in PHASES)
        self._times.append((grouped, done.seconds.get("score", 0.0)))
        if len(self._times) < self._rounds:
            return None
        fastest = [min(times) for times in zip(*(self._times[1:] or self._times), strict=True)]
        self._times = []
        if self._ensemble.halved:
            fastest[0] = math.inf
        room, used = _room(self._world.device), _memory(self._world.device)
        crowded = float(self._before + 2 * (used - self._before) > FULL * room)
        # JSON knows no infinity.
        reports = gather_objects(self._world, [min(fastest[0], 1e30), fastest[1], crowded])
        grouped, trained, is_full = (max(report[at] for report in reports) for at in range(3))
        for search, seconds in ((self.particles, grouped), (self.samples, trained)):
            if search is not None and not search.done:
                search.note(seconds, not is_full)
        self._apply()
        return None if self.measuring else self._in_words()

    @property
    def _rounds(self) -> int:
        """How many rounds of a size are measured: one where it has many calls, but for the first size, whose first
        round also warms up the process. The same on every rank."""
        active = [search for search in (self.particles, self.samples) if search is not None and not search.done]
        is_enough = all(search.seconds and search.most >= MANY * search.size for search in active)
        return 1 if is_enough else ROUNDS

    def state(self) -> dict[str, int]:
        """What was chosen by measurement, for the manifest; empty before that."""
        found = {"particles": self.particles, "samples": self.samples}
        return {name: search.size for name, search in found.items() if search is not None and search.done}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on with what was chosen before the run was stopped. What is not a size is measured again."""
        for name, search in (("particles", self.particles), ("samples", self.samples)):
            size = state.get(name) if isinstance(state, Mapping) else None
            if search is not None and isinstance(size, int) and not isinstance(size, bool) and size > 0:
                search.size, search.done = size, True
        self._apply()

    def _apply(self) -> None:
        if self.particles is not None:
            self._ensemble.regroup(self.particles.size)
        if self.samples is not None and self._training is not None:
            self._training.micro_batch = self.samples.size * self._views
        if self._world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._world.device)

    def _in_words(self) -> str:
        parts = []
        if self.particles is not None:
            parts.append(f"{self.particles.size} particles in one go")
        if self.samples is not None:
            parts.append(f"{self.samples.size * self._views} samples in a UNet call of the score's training")
        return f"measured and chosen: {', '.join(parts)}"


def _memory(device: torch.device) -> int:
    """The most bytes that were in use so far; of a GPU, since the last size was set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _room(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else host_memory()
