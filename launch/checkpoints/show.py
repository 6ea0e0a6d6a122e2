"""`gptdist ckpt list` and `verify`: what checkpoints there are, and whether they are what was written.

Reads, prints and marks; loads no torch.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gptdist.checkpoint.listing import CheckpointSummary, find_step_folders, list_checkpoints, summarize
from gptdist.checkpoint.read import is_checkpoint
from gptdist.checkpoint.verify import Verdict, verify_checkpoint
from gptdist.errors import EXIT_DONE, EXIT_FAILED, CheckpointError
from gptdist.monitor.console import render_bytes, render_duration

_WIDE = 10_000
_COLUMNS: dict[str, Literal["left", "right"]] = {
    "step": "right",
    "tokens": "right",
    "loss": "right",
    "size": "right",
    "layout": "left",
    "verified": "left",
    "age": "right",
    "state": "left",
}


def list_all(args: argparse.Namespace) -> int:
    """Print a table, newest first; sizes are checked, contents are not hashed."""
    folder = _checkpoints_dir(args.path)
    if is_checkpoint(args.path):
        summaries = [summarize(args.path, verify=False, trust_others=args.trust_others)]
    else:
        summaries = list_checkpoints(folder, trust_others=args.trust_others)
    if summaries:
        print_table(_COLUMNS, [_row(summary) for summary in summaries])
    else:
        print(f"no checkpoints in {folder}")
    return EXIT_DONE


def verify(args: argparse.Namespace) -> int:
    """Hash every byte of one checkpoint, or of all in a folder; exit 1 where any is bad."""
    paths = [args.path]
    if not is_checkpoint(args.path):
        paths = find_step_folders(_checkpoints_dir(args.path)) or []
    if not paths:
        raise CheckpointError(
            f"there is no checkpoint at {args.path}. Give a run's folder, its checkpoints folder, or one step-... "
            "folder."
        )
    bad = 0
    for path in paths:
        verdict = verify_checkpoint(path, trust_others=args.trust_others)
        bad += verdict.problem is not None
        print(_sentence(verdict), flush=True)
    if len(paths) > 1:
        print(f"{len(paths) - bad} of {len(paths)} are good", flush=True)
    return EXIT_FAILED if bad else EXIT_DONE


def print_table(columns: Mapping[str, Literal["left", "right"]], rows: Iterable[Sequence[str]]) -> None:
    """A table as wide as the terminal; as wide as need be where output goes elsewhere. Only the last column wraps."""
    table = Table(box=None, pad_edge=False)
    for title, side in columns.items():
        table.add_column(title, justify=side, no_wrap=title != list(columns)[-1])
    for row in rows:
        # As it is: no markup in it, and nothing that a terminal would obey.
        table.add_row(*(Text(cell if cell.isprintable() else ascii(cell)) for cell in row))
    Console(width=None if sys.stdout.isatty() else _WIDE).print(table)


def _checkpoints_dir(path: Path) -> Path:
    inner = path / "checkpoints"
    return inner if os.path.isdir(inner) else path


def _sentence(verdict: Verdict) -> str:
    if verdict.problem is not None:
        return f"{verdict.path.name}: bad: {verdict.problem}"
    marked = "" if verdict.marked else "; not marked as verified, since its folder cannot be written"
    return f"{verdict.path.name}: good: {verdict.tensors:,} tensors, {render_bytes(verdict.bytes)}{marked}"


def _row(summary: CheckpointSummary) -> list[str]:
    return [
        str(summary.step),
        "-" if summary.tokens is None else f"{summary.tokens:,}",
        "-" if summary.loss is None else f"{summary.loss:.4f}",
        render_bytes(summary.bytes),
        summary.layout or "-",
        "-" if summary.verified is None else f"{_age(summary.verified)} ago",
        "-" if summary.created is None else _age(summary.created),
        "good" if summary.ok else f"bad: {summary.reason}",
    ]


def _age(moment: str) -> str:
    try:
        return render_duration(max(0.0, (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()))
    except (ValueError, TypeError):  # somebody wrote it by hand
        return "?"
