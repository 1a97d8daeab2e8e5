"""Shipped for users: what their own tests of particles, priors and strategies need, and faults to test a run with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distvsd.testing.conformance import check_particle

__all__ = ["check_particle"]


def __getattr__(name: str) -> Any:
    # Lazily, because the trainer itself passes through `testing.faults` and must not load every particle for that.
    if name == "check_particle":
        from distvsd.testing.conformance import check_particle

        return check_particle
    raise AttributeError(f"module 'distvsd.testing' has no attribute {name!r}")
