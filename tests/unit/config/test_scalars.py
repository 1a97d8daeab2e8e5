"""Scalars get the values of YAML 1.1; every other text is refused without an exception."""

from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from distvsd.config.scalars import MAX_NUMBER, Unread, printable, read_scalar

CORE = "tag:yaml.org,2002:"
NAMES = ("null", "bool", "int", "float", "str", "timestamp", "value", "merge", "seq", "map", "binary", "set", "omap")
DIGITS = "0123456789abcdefxXoO_+-.:eE InNfA\u0665\n"


def by_pyyaml(text: str) -> object:
    """A plain scalar as PyYAML, another implementation of YAML 1.1, reads it."""
    return yaml.safe_load(text)


PLAIN = """
0 -0 +12 1_000 0b101 -0b1_0 0x1F 0xdead_beef 017 -0_7 1:30 190:20:30 1_0:05 1. .5 -1.5e+3 1_0.2_5 6.8523015e+5
685_230.15 190:20:30.15 .inf -.INF +.Inf ~ null NULL yes Off TRUE no a 1e3 09 0o7 = << 1:60 --1
"""


@pytest.mark.parametrize("text", PLAIN.split())
def test_a_plain_scalar_is_what_yaml_1_1_says(text: str) -> None:
    tag = yaml.SafeLoader("").resolve(yaml.ScalarNode, text, (True, False))
    expected = text if text in "=<<" else by_pyyaml(text)
    value = read_scalar(tag, text)
    assert value == expected and type(value) is type(expected)


@given(st.integers(-(10**80), 10**80), st.sampled_from(["{}", "{:#x}", "{:#b}", "{:_}"]))
@settings(max_examples=50)
def test_integers_in_every_base_are_what_yaml_1_1_says(number: int, form: str) -> None:
    text = form.format(number)
    value = read_scalar(f"{CORE}int", text)
    if len(text) <= MAX_NUMBER:
        assert value == by_pyyaml(text) == number
    else:
        assert isinstance(value, Unread) and str(len(text)) in value.said


@given(st.floats())
@settings(max_examples=50)
def test_floats_as_yaml_writes_them_read_back(number: float) -> None:
    text = yaml.safe_dump(number).removesuffix("\n...\n")
    value = read_scalar(f"{CORE}float", text)
    assert isinstance(value, float)
    assert value == number or (math.isnan(value) and math.isnan(number))


@given(st.sampled_from(NAMES) | st.text(max_size=20), st.text(max_size=120) | st.text(DIGITS, max_size=200))
@settings(max_examples=200)
def test_no_text_with_any_tag_raises(name: str, text: str) -> None:
    for tag in (CORE + name, name):
        value = read_scalar(tag, text)
        assert value is None or isinstance(value, bool | int | float | str | Unread)
        hash(value)
        if isinstance(value, Unread):
            assert value.said.isprintable() and len(value.said) < 300


@given(st.text(st.characters(), max_size=40))
def test_characters_above_ffff_may_be_pairs_of_surrogates(text: str) -> None:
    """JSON writes such pairs. They follow the formula of the Unicode standard, section 3.9."""
    pairs = "".join(
        character
        if ord(character) < 0x10000
        else chr(0xD800 + (ord(character) - 0x10000) // 0x400) + chr(0xDC00 + (ord(character) - 0x10000) % 0x400)
        for character in text
    )
    value = read_scalar(f"{CORE}str", pairs)
    if any(0xD800 <= ord(character) < 0xE000 for character in text):
        assert isinstance(value, Unread) or all(not 0xD800 <= ord(character) < 0xE000 for character in value)
    else:
        assert value == text


@pytest.mark.parametrize("text", ["\ud83d", "\ude00", "a\ud83d b", "\ude00\ud83d", "\ud83d\ud83d\ude00"])
def test_a_surrogate_without_its_other_half_is_no_text(text: str) -> None:
    assert isinstance(read_scalar(f"{CORE}str", text), Unread)


def test_a_shown_text_is_one_short_line_without_control_characters() -> None:
    assert printable("a\x00\x1b[31m\n\u202e\ud800\U0001f600") == "a\\x00\\x1b[31m\\n\\u202e\\ud800\U0001f600"
    assert printable("a" * 100, 10) == "a" * 10 + "..."
