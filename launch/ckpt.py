"""`gptdist ckpt list`: the checkpoints of a run, one a line."""

import argparse
from datetime import UTC, datetime

from rich.console import Console
from rich.table import Table

from gptdist.checkpoint.listing import CheckpointSummary, list_checkpoints
from gptdist.errors import EXIT_DONE
from gptdist.monitor.console import render_bytes, render_duration


def main(args: argparse.Namespace) -> int:
    """Print a table, newest first; sizes are checked, contents are not hashed."""
    folder = args.path / "checkpoints" if (args.path / "checkpoints").is_dir() else args.path
    table = Table(box=None, pad_edge=False)
    for title in ("step", "samples", "loss", "size", "age", "layout", "state"):
        table.add_column(title, justify="right" if title in ("step", "samples", "loss", "size", "age") else "left")
    summaries = list_checkpoints(folder)
    for summary in summaries:
        table.add_row(*_row(summary))
    Console().print(table if summaries else f"no checkpoints in {folder}")
    return EXIT_DONE


def _row(summary: CheckpointSummary) -> list[str]:
    age = "-"
    if summary.created:
        age = render_duration((datetime.now(UTC) - datetime.fromisoformat(summary.created)).total_seconds())
    return [
        str(summary.step),
        "-" if summary.samples is None else f"{summary.samples:,}",
        "-" if summary.loss is None else f"{summary.loss:.4f}",
        render_bytes(summary.bytes),
        age,
        summary.layout or "-",
        "good" if summary.ok else f"bad: {summary.reason}",
    ]
