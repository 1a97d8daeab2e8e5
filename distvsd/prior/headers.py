"""Shapes of a model's tensors from the headers of its files; no weight is read and no library of models imported."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from distvsd.errors import PriorError


def shapes_of(files: Iterable[Path]) -> dict[str, list[int]]:
    """By name, of all tensors in safetensors files. Raises PriorError for a file that is not one."""
    shapes: dict[str, list[int]] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 - no dict
        except (SafetensorError, OSError) as error:
            raise PriorError(f"{file} cannot be read ({error}); fetch or save the pipeline again") from error
    return shapes
