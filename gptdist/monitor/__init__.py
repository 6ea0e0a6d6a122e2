"""Watching a run: throughput, console lines, and the places where values are recorded. Never stops training."""
