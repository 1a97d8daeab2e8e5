"""The frozen teacher: any diffusers text-to-image pipeline in a local folder, or the embedded `shapes` prior.

`load_prior` makes one. The heavy libraries are imported when it is called, not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Pipeline", "Prior", "PromptTable", "load_prior"]

if TYPE_CHECKING:
    from distvsd.prior.base import Prior
    from distvsd.prior.load import load_prior
    from distvsd.prior.pipeline import Pipeline
    from distvsd.prior.prompts import PromptTable

_HOMES = {
    "Pipeline": "distvsd.prior.pipeline",
    "Prior": "distvsd.prior.base",
    "PromptTable": "distvsd.prior.prompts",
    "load_prior": "distvsd.prior.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'distvsd.prior' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
