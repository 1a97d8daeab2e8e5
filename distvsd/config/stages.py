"""The stages of a run: each is the configuration with some of its fields changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

from distvsd.config.ranges import FolderName

# Sections and fields that a stage may change, and fields in them that it may not: ids stay from stage to stage.
_CHANGEABLE = ("objective", "particles", "cameras", "render", "score", "schedule")
_CHANGEABLE_FIELDS = ("prior.guidance_scale", "prior.view_dependent", "prior.negative_prompt")
_FIXED = ("particles.count",)

Section = TypeVar("Section")


@dataclass(frozen=True)
class StageConfig:
    """One stage. changes: dotted keys of `Config` with their values, in the order of the schema."""

    name: Annotated[str, FolderName()]
    """Names the stage and its folder, stages/NUMBER-NAME."""
    changes: tuple[tuple[str, Any], ...] = ()
    """What is different in this stage."""


def may_change(key: str) -> bool:
    """Whether a stage may hold this dotted key, a field or a section."""
    if key in _FIXED:
        return False
    return key.split(".")[0] in _CHANGEABLE or any(
        field == key or field.startswith(f"{key}.") for field in _CHANGEABLE_FIELDS
    )


def changed(section: Section, changes: Mapping[str, Any]) -> Section:
    """A copy of a section in which the fields with these dotted keys, also in inner sections, have these values."""
    values: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        name, dot, rest = key.partition(".")
        if dot:
            inner.setdefault(name, {})[rest] = value
        else:
            values[name] = value
    values |= {name: changed(getattr(section, name), deeper) for name, deeper in inner.items()}
    return replace(section, **values)  # type: ignore[type-var]
