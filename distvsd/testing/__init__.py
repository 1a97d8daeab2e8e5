"""Shipped for users: what their own tests of particles, priors and strategies need."""

from distvsd.testing.conformance import check_particle

__all__ = ["check_particle"]
