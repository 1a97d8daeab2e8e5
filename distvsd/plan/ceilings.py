"""Measures what this machine does at most, in about a second: a large matrix product and a large copy."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import torch

from distvsd.plan.floor import Ceilings

_BUDGET_S: Final = 0.4  # for each of the two
_EDGES: Final = (512, 1024, 2048, 4096, 8192)
_LONG_ENOUGH_S: Final = 0.01  # of one product: a longer one would not be faster
_COPY_BYTES: Final = {"cpu": 2**27, "cuda": 2**30}  # far above the caches


def measure_ceilings(dtype: str, device: torch.device | None = None) -> Ceilings:
    """Of this process: with its threads on a CPU. dtype: of the networks. device: None is the GPU where there is one.

    Takes the best of several tries, because what else runs here only takes time away.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = getattr(torch, dtype)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    gflops = _product_rate(kind, device) / 1e9
    return Ceilings(gflops, _copy_rate(device) / 1e9, f"{dtype}, {where}, measured here")


def _product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of the fastest square matrix product."""
    best, left = 0.0, _BUDGET_S
    for edge in _EDGES:
        a = torch.ones(edge, edge, dtype=dtype, device=device)
        b, out = torch.ones_like(a), torch.empty_like(a)
        seconds = _best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), left / 2, device)  # type: ignore[misc]
        best, left = max(best, 2 * edge**3 / seconds), left / 2
        if seconds > _LONG_ENOUGH_S:
            break
    return best


def _copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written."""
    source = torch.ones(_COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), _BUDGET_S, device)


def _best(action: Callable[[], object], budget_s: float, device: torch.device) -> float:
    """The shortest of the runs that fit into the budget, seconds; at least three runs after a first one."""
    action()
    runs: list[float] = []
    until = time.perf_counter() + budget_s
    while len(runs) < 3 or time.perf_counter() < until:
        _synchronise(device)
        began = time.perf_counter()
        action()
        _synchronise(device)
        runs.append(time.perf_counter() - began)
    return min(runs)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
