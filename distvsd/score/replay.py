"""Recent renders of all ranks, kept to train the score network and to measure its lag behind the particles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from torch import Tensor

from distvsd.errors import CheckpointError
from distvsd.score.base import Score
from distvsd.score.camera import CAMERA_FEATURES
from distvsd.score.scattered import Renders, joined
from distvsd.vsd import rng
from distvsd.vsd.rng import Purpose
from distvsd.vsd.samples import Samples
from distvsd.vsd.wanted import MOST, Wanted, refuse_misfits

_NAME = "the replay buffer"
_ADVICE = "the checkpoint is torn or was altered: delete it to go on from an older one"


@dataclass(frozen=True)
class Stored:
    """The valid renders of one round."""

    round: int
    samples: Renders


def _as_it_is(renders: Renders) -> Samples:
    assert isinstance(renders, Samples), "renders that are with their owners need `whole`"
    return renders


def _all(samples: Samples) -> Renders:
    return samples


class Replay:
    """A ring of the last `rounds` gathered batches; masked samples are not kept, so all that is stored is finite.

    Every rank pushes the same renders, so every rank knows the same ring, of which it holds what it has of them (see
    `score.sharing`). num_views: adjacent rows of a particle, which are kept, dropped and drawn together. len() counts
    samples.
    """

    def __init__(self, rounds: int, num_views: int = 1, device: torch.device | str = "cpu") -> None:
        self._rounds, self._num_views = rounds, num_views
        self._device = device
        self._ring: list[Stored] = []

    def __len__(self) -> int:
        return sum(len(stored.samples) for stored in self._ring)

    @property
    def rounds(self) -> list[int]:
        """The rounds that are stored, oldest first."""
        return [stored.round for stored in self._ring]

    def push(self, samples: Renders, round: int) -> None:
        """Stores a gathered batch, detached; a batch without a valid sample is not stored.

        Rounds stored as `round` or later are replaced: the run was rolled back. Batches of another latent shape are
        dropped: after a change of resolution they cannot share a batch.
        """
        valid = samples.detached()[samples.weight > 0].to(self._device)
        kept = [old for old in self._ring if old.round < round and old.samples.shape == valid.shape]
        if len(valid):
            kept.append(Stored(round, valid))
        self._ring = kept[max(len(kept) - self._rounds, 0) :]

    def draw(self, count: int, seed: int, round: int, lane: int = 0) -> Renders:
        """The rows of `count` stored particles, uniform with replacement; a pure function of the content and (seed,
        round, lane).

        A smaller draw is the beginning of a larger one. Raises ValueError when nothing is stored.
        """
        if not len(self):
            raise ValueError("replay buffer is empty: push a batch with a valid sample before drawing from it")
        pool = joined([stored.samples for stored in self._ring])
        uniform = rng.uniform(seed, Purpose.REPLAY, [0], round, (count,), lane)[0]
        # float64: the product of a 24-bit uniform and the count is then exact, so the index is below the count.
        particles = (uniform.double() * (len(pool) // self._num_views)).long()
        rows = particles[:, None] * self._num_views + torch.arange(self._num_views)
        return pool[rows.flatten().to(pool.ids.device)]

    def oldest(self) -> Renders | None:
        """The batch that has been stored longest, `rounds[0]`; None when nothing is stored."""
        return self._ring[0].samples if self._ring else None

    def state(self, whole: Callable[[Renders], Samples] = _as_it_is) -> dict[str, Tensor]:
        """Copies on the CPU: the rows of all rounds, oldest first, and the number of rows of each round. whole: makes
        the renders of a round whole; called once a round, the same on every rank."""
        tensors = {
            "rounds": torch.tensor(self.rounds, dtype=torch.int64),
            "counts": torch.tensor([len(stored.samples) for stored in self._ring], dtype=torch.int64),
        }
        if self._ring:
            pool = Samples.cat([whole(stored.samples).to("cpu") for stored in self._ring])
            tensors |= {field.name: getattr(pool, field.name) for field in fields(pool)}
        return tensors

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises CheckpointError for what `load_state` cannot read."""
        Limits().refuse_unfit(tensors)

    def load_state(self, tensors: Mapping[str, Tensor], keep: Callable[[Samples], Renders] = _all) -> None:
        """Inverse of `state`; keeps the newest rounds of a longer ring, and of each what `keep` returns. Raises
        CheckpointError, and changes nothing, for what `Limits` refuses.

        Rounds that do not consist of whole particles are dropped: they come from another `particles.views`.
        """
        self.check(tensors)
        counts = tensors["counts"].tolist()
        self._ring = []
        if counts:
            split = {field.name: torch.split(tensors[field.name], counts) for field in fields(Samples)}
            batches = [Samples(*rows).to(self._device) for rows in zip(*split.values(), strict=True)]
            ring = [Stored(int(at), keep(rows)) for at, rows in zip(tensors["rounds"].tolist(), batches, strict=True)]
            whole = [stored for stored in ring if self._is_whole(stored.samples.ids)]
            self._ring = whole[max(len(whole) - self._rounds, 0) :]

    def _is_whole(self, ids: Tensor) -> bool:
        """Whether these rows are `num_views` adjacent ones of each particle."""
        if len(ids) % self._num_views:
            return False
        particles = ids.reshape(-1, self._num_views)
        return bool((particles == particles[:, :1]).all())


@dataclass(frozen=True)
class Limits:
    """What a stored replay buffer may hold; the defaults are those of any run.

    kept: rounds in the ring. rounds: completed when it was saved. particles, views: ids and view indices are below.
    channels: of the latents, None where the prior is not known. The rows of a round have no limit of their own: a
    resume may change particles.views, and the rows of the rounds before it stay.
    """

    kept: int = MOST
    rounds: int = MOST
    particles: int = MOST
    views: int = MOST
    channels: int | None = None

    def refuse_unfit(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises CheckpointError unless `tensors` is a state that `Replay.load_state` reads."""
        num_rounds = tensors["counts"].numel() if "counts" in tensors else 0
        self._refuse(
            tensors,
            {
                "rounds": Wanted(torch.int64, (num_rounds,), 0, self.rounds - 1),
                "counts": Wanted(torch.int64, (num_rounds,), 1, MOST),
            },
        )
        if num_rounds > self.kept:
            raise CheckpointError(
                f"{_NAME}: rounds has {num_rounds} rounds, and must have at most {self.kept}; {_ADVICE}"
            )
        if any(earlier >= later for earlier, later in pairwise(tensors["rounds"].tolist())):
            raise CheckpointError(f"{_NAME}: rounds does not increase, and must; {_ADVICE}")
        if num_rounds:
            latents = tensors.get("latents")
            shape = tuple(latents.shape[1:]) if latents is not None and latents.ndim == 4 else (1, 1, 1)
            self._refuse(tensors, self._columns(sum(tensors["counts"].tolist()), shape))

    def _columns(self, rows: int, shape: tuple[int, ...]) -> dict[str, Wanted]:
        """shape: of one stored latent. Its height and width may be any: after a change of resolution it is dropped."""
        channels, height, width = shape
        latent = (self.channels or max(channels, 1), max(height, 1), max(width, 1))
        return {
            "latents": Wanted(torch.float32, (rows, *latent), finite=True),
            "cameras": Wanted(torch.float32, (rows, CAMERA_FEATURES), finite=True),
            "ids": Wanted(torch.int64, (rows,), 0, self.particles - 1),
            "views": Wanted(torch.int64, (rows,), 0, self.views - 1),
            "weight": Wanted(torch.float32, (rows,), low=0, finite=True),
        }

    def _refuse(self, tensors: Mapping[str, Tensor], wanted: Mapping[str, Wanted]) -> None:
        refuse_misfits(_NAME, wanted, tensors, _ADVICE)


def on_policy_lag(score: Score, current: Samples, old: Samples, seed: int, round: int) -> float | None:
    """Score loss on `current` minus score loss on `old`, with the same timesteps and noise: 0 when the score keeps up.

    Compares the views that both batches have (the k-th view of a particle with its k-th view), so that masked samples
    do not bias the comparison; None when there are none, or the latent shapes differ. No graph, no communication. The
    draws are keyed by particle, so results of ranks with different particles may be averaged, weighted by counts.
    """
    current, old = current[current.weight > 0], old[old.weight > 0]
    if current.latents.shape[1:] != old.latents.shape[1:]:
        return None
    keys_current, keys_old = _view_keys(current.ids), _view_keys(old.ids)
    current = current[torch.isin(keys_current, keys_old)]
    old = old[torch.isin(keys_old, keys_current)]
    if not len(current):
        return None
    with torch.no_grad():
        return float((_keyed_loss(score, current, seed, round) - _keyed_loss(score, old, seed, round)).item())


def _keyed_loss(score: Score, samples: Samples, seed: int, round: int) -> Tensor:
    share = torch.empty_like(samples.weight)
    noise = torch.empty_like(samples.latents)
    slots = _slots(samples.ids)
    for slot in range(int(slots.max()) + 1):
        rows = slots == slot
        ids = samples.ids[rows]
        share[rows] = rng.uniform(seed, Purpose.LAG, ids, round, (), lane=2 * slot)
        noise[rows] = rng.normal(seed, Purpose.LAG, ids, round, noise.shape[1:], lane=2 * slot + 1)
    keep_camera = torch.ones_like(samples.ids, dtype=torch.bool)
    return score.loss(samples, score.process.times(share, 0.0, 1.0), noise, keep_camera).mean(dtype=torch.float64)


def _slots(ids: Tensor) -> Tensor:
    """`[N]`: how many earlier rows have the same id."""
    seen: dict[int, int] = {}
    slots = []
    for particle in ids.tolist():
        slots.append(seen.get(particle, 0))
        seen[particle] = slots[-1] + 1
    return torch.tensor(slots, dtype=torch.int64, device=ids.device)


def _view_keys(ids: Tensor) -> Tensor:
    """One number for each (particle, slot); slots stay far below 2^20."""
    return ids << 20 | _slots(ids)
