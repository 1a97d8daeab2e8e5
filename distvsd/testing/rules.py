"""How a conformance check says that a rule is broken, and how it compares."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

ROUNDING = 1e-4  # relative; batches of another size may add in another order


def require(holds: bool, otherwise: str) -> None:
    """Raises AssertionError with `otherwise`, one paragraph: what is wrong and why it matters."""
    if not holds:
        raise AssertionError(otherwise)


@contextmanager
def subject(text: str) -> Iterator[None]:
    """Puts `text` before the message of a broken rule, and refuses draws from torch's global random state."""
    before = torch.get_rng_state()
    try:
        yield
        require(
            torch.equal(before, torch.get_rng_state()),
            "torch's global random state was used; what it gives depends on everything drawn before, so that a resumed "
            "run would differ: draw from distvsd.vsd.rng",
        )
    except AssertionError as error:
        raise AssertionError(f"{text}: {error}") from error


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(a: Tensor, b: Tensor) -> bool:
    scale = float(b.detach().abs().amax()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=ROUNDING, atol=ROUNDING * max(scale, 1e-12))


def row_of(parameters: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: value[row] for name, value in parameters.items()}
