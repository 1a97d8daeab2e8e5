"""`python -m distvsd.train CONFIG`, under any launcher, is `distvsd train`. In Python, call `distvsd.train(config)`."""

from __future__ import annotations

import sys

from distvsd.cli import program

if __name__ == "__main__":
    program(["train", *sys.argv[1:]])
