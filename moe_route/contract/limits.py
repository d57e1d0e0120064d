"""Limits of the compiled operators, as numbers that can be read without the library; a test compares the two."""

from __future__ import annotations

MAX_EXPERTS = 4096  # experts of one layer (`kMaxExperts` in gate.h)
MAX_CHOSEN = 64  # experts per token (`kMaxChosen` in gate.h)
MAX_ROWS = 1 << 30  # rows of a dispatch (`kMaxRows` in dispatch.h)
