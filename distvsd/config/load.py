"""The strict loader: a YAML file and `key.sub=value` overrides become a Config, or one error with every mistake."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distvsd.config.canonical import diff, digest, to_dict, to_yaml
from distvsd.config.document import Entry, plain_entry, read_document, read_override, shown_path
from distvsd.config.read_stages import read_stages
from distvsd.config.reader import Reader, dotted_keys, hints, is_section
from distvsd.config.schema import Config
from distvsd.config.stages import changed
from distvsd.errors import ConfigError

__all__ = ["config_from", "diff", "digest", "dotted_keys", "hints", "is_section", "load_config", "to_dict", "to_yaml"]

# The most that a message shows; a file of another kind can hold thousands of mistakes.
MAX_MISTAKES = 100


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Reads a configuration; later overrides win, and a section given twice is merged field by field.

    Raises ConfigError with all mistakes, each with its place, dotted key, allowed values and the nearest known key.
    """
    mistakes: list[str] = []
    layers = [read_document(Path(path), mistakes)]
    for text in overrides:
        entry = read_override(text, mistakes)
        if entry is not None:
            layers.append(entry)
    return _config_of(layers, mistakes, shown_path(Path(path)), "; nothing was started")


def config_from(plain: Mapping[str, Any], where: str) -> Config:
    """The configuration from the plain data of `to_dict`, also after a round trip through JSON. where: its name in
    errors.

    Raises ConfigError as `load_config` does.
    """
    return _config_of([plain_entry(plain, where)], [], where, "")


def _config_of(layers: Sequence[Entry], mistakes: list[str], where: str, consequence: str) -> Config:
    """The configuration of all layers, the last one winning. Raises ConfigError with `mistakes` and those it finds."""
    reader = Reader(mistakes)
    fields = reader.fields(Config, "", layers)
    stages = fields.pop("stages", ())
    config = changed(Config(), fields)
    reader.relations(config)
    if stages:
        config = replace(config, stages=read_stages(stages, config, reader))
    if mistakes:
        noun = "mistake" if len(mistakes) == 1 else "mistakes"
        listed = "".join(f"\n  {mistake}" for mistake in mistakes[:MAX_MISTAKES])
        more = f"\n  and {len(mistakes) - MAX_MISTAKES} more" if len(mistakes) > MAX_MISTAKES else ""
        raise ConfigError(f"{len(mistakes)} {noun} in the configuration {where}{consequence}:{listed}{more}")
    return config
