"""Shipped for users: what their own tests of particles, samplers, networks and objectives need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distvsd.testing.conformance import check_particle
    from distvsd.testing.denoiser import check_denoiser
    from distvsd.testing.flow import as_flow
    from distvsd.testing.objective import check_objective

__all__ = ["as_flow", "check_denoiser", "check_objective", "check_particle"]

_HOMES = {
    "as_flow": "flow",
    "check_denoiser": "denoiser",
    "check_objective": "objective",
    "check_particle": "conformance",
}


def __getattr__(name: str) -> Any:
    """Loaded when first used: `distvsd.testing.ranks` and others must not load every room."""
    if name not in _HOMES:
        raise AttributeError(f"module 'distvsd.testing' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(f"distvsd.testing.{_HOMES[name]}"), name)
