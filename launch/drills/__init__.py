"""Faults on purpose, each with what must come of it."""
