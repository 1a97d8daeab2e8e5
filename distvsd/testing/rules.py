"""How a conformance check says that a rule is broken."""

from __future__ import annotations


def require(holds: bool, otherwise: str) -> None:
    """Raises AssertionError with `otherwise`, one paragraph: what is wrong and why it matters."""
    if not holds:
        raise AssertionError(otherwise)
