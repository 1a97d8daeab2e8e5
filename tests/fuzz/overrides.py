"""Command-line words: random `key=value` overrides and options of `distvsd plan`."""

from __future__ import annotations

import contextlib
import io
import os
import random
from pathlib import Path

from distvsd.cli import main
from distvsd.config import load_config
from distvsd.config.load import dotted_keys
from distvsd.errors import UsageError
from tests.fuzz.configurations import WORDS, check, is_a_section, value

SMOKE = str(Path(__file__).parents[2] / "configs" / "smoke.yaml")
OPTIONS = ("--nodes", "--gpus-per-node", "--round-s", "--disk-mb-s", "--restart-s", "--node-mtbf-days", "--json", "--x")


def attempt(draw: random.Random, folder: Path) -> None:
    nasty = draw.choice((0.0, 0.0, 0.1, 0.6))
    words = [_override(draw, nasty) for _ in range(draw.choice((0, 1, 1, 2, 5, 40)))]
    if draw.random() < 0.7:
        check(draw, folder, lambda: load_config(SMOKE, words))
        return
    for _ in range(draw.choice((0, 1, 2))):
        words.insert(draw.randint(0, len(words)), _option(draw, nasty))
    said, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(told):
        try:
            code = main(["plan", SMOKE, *words])
        except SystemExit as ended:  # from argparse, after it has printed its message
            code = ended.code if isinstance(ended.code, int) else 1
    if code:
        assert code == 2 and told.getvalue(), f"ended with {code} and said {told.getvalue()!r}"
        assert len(told.getvalue()) < 100_000, f"said {len(told.getvalue())} characters"
        raise UsageError(told.getvalue())
    assert said.getvalue() and len(said.getvalue()) < 300_000, f"a plan of {len(said.getvalue())} characters"


def _override(draw: random.Random, nasty: float) -> str:
    key = draw.choice([key for key in dotted_keys() if not is_a_section(key)] if nasty == 0 else dotted_keys())
    text = f"{key}={value(draw, key, nasty)}"
    if draw.random() < nasty:
        at = draw.randrange(len(text) + 1)
        odd = (".", "=", "..", "\0", "\x1b", "\u202e", "\n", " ", "[" * 400, "a." * 500, os.fsdecode(b"\xff"), *WORDS)
        text = text[:at] + draw.choice(odd) + text[at + draw.choice((0, 0, 1, 5)) :]
    return text


def _option(draw: random.Random, nasty: float) -> str:
    option = draw.choice(OPTIONS[:-1] if nasty == 0 else OPTIONS)
    if option == "--json" and draw.random() < 0.9:
        return option
    return f"{option}={draw.choice(('1', '2', '8', '1000000') if nasty == 0 else WORDS)}"
