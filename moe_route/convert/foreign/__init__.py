"""Formats of other programs: a module here reads and writes some of them, and is all that a new one needs."""
