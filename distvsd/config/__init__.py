"""The configuration of a run: its fields, the strict loader, the canonical form. Imports no torch."""

from distvsd.config.canonical import diff, digest, to_dict, to_yaml
from distvsd.config.load import config_from, load_config
from distvsd.config.reference import fields_reference
from distvsd.config.schedule import Schedule
from distvsd.config.schema import Config

__all__ = [
    "Config",
    "Schedule",
    "config_from",
    "diff",
    "digest",
    "fields_reference",
    "load_config",
    "to_dict",
    "to_yaml",
]
