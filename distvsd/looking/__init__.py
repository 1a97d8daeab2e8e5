"""Looks at the particles of a run: pictures, turntables, measurements."""
