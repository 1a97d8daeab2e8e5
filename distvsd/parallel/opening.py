"""How ranks find each other after a start, and after a restart by the launcher.

torchrun and accelerate keep one store over all restarts, and torch writes every rank's address into it under fixed
names (torch 2.13, `_create_c10d_store`). After a restart a rank would read the address of a dead process. So all ranks
first agree on an unused name, and the group puts its keys under that name.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist

from distvsd.errors import RankError

_START = "distvsd/start"
_POLL_S = 0.1


class Store(Protocol):
    """The part of torch's stores that is used here; torch exports them without types."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


def fresh_store(rank: int, size: int, timeout_s: float) -> Store:
    """An empty store at the launcher's address (MASTER_ADDR, MASTER_PORT). Every rank calls it.

    Raises RankError if a rank is missing after `timeout_s`, RuntimeError if the store cannot be reached.
    """
    timeout = timedelta(seconds=timeout_s)
    store, _, _ = next(iter(dist.rendezvous("env://", rank, size, timeout=timeout)))  # type: ignore[attr-defined]
    fresh: Store = dist.PrefixStore(agreed_name(store, rank, size, timeout_s), store)  # type: ignore[attr-defined]
    return fresh


def agreed_name(store: Store, rank: int, size: int, timeout_s: float) -> str:
    """A new name, the same on every rank. Every rank calls it.

    Rank 0 invents and publishes it. Every other rank answers with a random number, and goes on only once rank 0 has
    repeated that number; keys left by an earlier start cannot do so. Raises RankError after `timeout_s`.
    """
    mine = uuid.uuid4().hex
    deadline = time.monotonic() + timeout_s
    if rank == 0:
        store.set(_START, mine)
        keys = {other: f"distvsd/{mine}/{other}" for other in range(1, size)}
        while missing := [other for other, key in keys.items() if not store.check([key])]:
            _pause(deadline, f"ranks {', '.join(map(str, missing[:16]))} of {size} did not come")
        store.set(f"distvsd/{mine}/all", " ".join(store.get(key).decode() for key in keys.values()))
        return mine
    answered = None
    while True:
        name = store.get(_START).decode() if store.check([_START]) else None
        if name is not None and name != answered:
            store.set(f"distvsd/{name}/{rank}", mine)
            answered = name
        all_of_them = f"distvsd/{name}/all"
        if name is not None and store.check([all_of_them]) and mine in store.get(all_of_them).decode().split():
            return name
        _pause(deadline, f"rank 0 of {size} did not come, or waits for others")


def _pause(deadline: float, problem: str) -> None:
    if time.monotonic() > deadline:
        raise RankError(f"{problem} to the opening of the world in time; the logs of those ranks say why")
    time.sleep(_POLL_S)
