"""`python -m distvsd` is the command line."""

from __future__ import annotations

from distvsd.cli import program

if __name__ == "__main__":
    program()
