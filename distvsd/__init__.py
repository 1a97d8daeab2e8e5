"""distvsd: Variational Score Distillation at scale: ranks own particles, one shared LoRA learns from all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Config", "Particle", "Prior", "Run", "Score", "load_config", "train"]

if TYPE_CHECKING:
    from distvsd.config import Config, load_config
    from distvsd.particles.base import Particle
    from distvsd.prior.base import Prior
    from distvsd.run.build import Run
    from distvsd.run.train import train
    from distvsd.score.base import Score

_HOMES = {
    "Config": "distvsd.config",
    "load_config": "distvsd.config",
    "Particle": "distvsd.particles.base",
    "Prior": "distvsd.prior.base",
    "Score": "distvsd.score.base",
    "Run": "distvsd.run.build",
    "train": "distvsd.run.train",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that `import distvsd` takes no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'distvsd' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
