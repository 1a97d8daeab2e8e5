"""Shipped for users: what their own tests of particles, priors and strategies need."""
