"""Shipped for users: what their own tests of particles, samplers, networks and objectives need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distvsd.testing.denoiser import check_denoiser
    from distvsd.testing.flow import as_flow
    from distvsd.testing.objective import check_objective
    from distvsd.testing.particle import check_particle
    from distvsd.testing.sampler import check_sampler

__all__ = ["as_flow", "check_denoiser", "check_objective", "check_particle", "check_sampler"]


def __getattr__(name: str) -> Any:
    """Loads a name on first use: importing `distvsd.testing.ranks` must not load every package."""
    if name not in __all__:
        raise AttributeError(f"module 'distvsd.testing' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(f"distvsd.testing.{name.partition('_')[2]}"), name)
