"""The reference of all fields comes from the schema, and every field has a text."""

from __future__ import annotations

import dataclasses

import pytest

from distvsd.config import Config, fields_reference
from distvsd.config.load import dotted_keys, hints, is_section
from distvsd.config.reference import field_docs, print_reference


def sections(section: type) -> list[type]:
    inner = [hint for hint in hints(section).values() if is_section(hint)]
    return [section, *(deeper for one in inner for deeper in sections(one))]


@pytest.mark.parametrize("section", sections(Config), ids=lambda section: section.__name__)
def test_every_field_has_a_text_below_it(section: type) -> None:
    docs = field_docs(section)
    for field in dataclasses.fields(section):
        assert docs.get(field.name, "").endswith("."), f"{section.__name__}.{field.name} has no text below it"


def test_the_reference_lists_every_field_once_and_no_section() -> None:
    keys = [row.key for row in fields_reference()]
    assert len(keys) == len(set(keys))
    assert {"prompt", "particles.nerf.levels", "parallel.timeout_s"} <= set(keys)
    assert "particles.nerf" not in keys
    assert set(keys) <= set(dotted_keys())


def test_a_field_is_printed_with_range_default_and_meaning() -> None:
    text = print_reference()
    assert "particles.count\n    Number of particles over all ranks" in text
    assert "integer at least 1, at most 2147483647, default 8" in text
    assert "vsd | sds | esd, default 'vsd'" in text
    assert "two numbers, each above -90, below 90, first not larger than second, default [-10, 45]" in text
    assert text.isascii()
