"""`gptdist status`: how far runs are, from any machine that sees their folders; by files and squeue only.

Gathers and prints. What the files say is `run_files.py`'s, what that means `run_status.py`'s.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from gptdist.errors import EXIT_DONE, GptdistError, SlurmUnavailable
from gptdist.monitor.console import render_count, render_duration
from launch.checkpoints.show import print_table
from launch.runs.run_files import find_runs, is_run, read_run
from launch.runs.run_status import Restart, RunStatus, build_status
from launch.cluster.slurm_queue import QueuedJob, read_queue

RUNS_DIR = Path("runs")
SHOWN_RESTARTS = 10
SHOWN_NOTES = 10
_COLUMNS: dict[str, Literal["left", "right"]] = {
    "run": "left",
    "state": "left",
    "step": "right",
    "loss": "right",
    "tok/s": "right",
    "eta": "right",
    "goodput": "right",
    "saved": "right",
    "restarts": "right",
    "": "left",
}
_CLEAR_SCREEN = "\x1b[H\x1b[2J"


def main(args: argparse.Namespace) -> int:
    """Print one run, or all; again and again with --watch."""
    while True:
        shown = _gather(args.run)
        if args.watch and sys.stdout.isatty():
            print(_CLEAR_SCREEN, end="")
        if args.json:
            statuses = [asdict(status) for status in shown]
            print(json.dumps(statuses if args.run is None else statuses[0], default=str))
        elif args.run is not None:
            print(render_status(shown[0]))
        elif shown:
            print_table(_COLUMNS, [_row(status) for status in shown])
        else:
            print(f"no runs below {RUNS_DIR}, and none in Slurm's queue. Name one: gptdist status RUN")
        if args.watch is None:
            return EXIT_DONE
        sys.stdout.flush()
        time.sleep(args.watch)


def _gather(run: Path | None) -> list[RunStatus]:
    queue, trouble = _queue(None if run is None else _owner(run))
    runs = [run] if run is not None else _all_runs(queue or ())
    found = []
    for path in runs:
        try:
            found.append(read_run(path))
        except GptdistError as error:
            if run is not None:
                raise
            print(f"warning: {error}", file=sys.stderr)
    if trouble and any(files.concerns_slurm for files in found):
        print(f"warning: {trouble} What follows is from files alone.", file=sys.stderr)
    return [build_status(files, queue, time.time()) for files in found]


def _all_runs(queue: Sequence[QueuedJob]) -> list[Path]:
    runs = find_runs(RUNS_DIR)
    known = {os.path.realpath(path) for path in runs}
    for job in queue:
        folder = Path(os.path.dirname(job.script))
        if job.script and os.path.realpath(folder) not in known and is_run(folder):
            known.add(os.path.realpath(folder))
            runs.append(folder)
    return runs


def _queue(user: str | None) -> tuple[list[QueuedJob] | None, str]:
    """The queue, or why it is not known."""
    try:
        return read_queue(user), ""
    except SlurmUnavailable as error:
        return None, str(error)


def _owner(run: Path) -> str | None:
    """Whose jobs to ask for; by number where the name is not known here."""
    try:
        return str(run.stat().st_uid)
    except OSError:
        return None


def render_status(status: RunStatus) -> str:
    """One run, a line for each thing."""
    rows: list[tuple[str, str]] = [("run", status.run), ("state", f"{status.state}: {status.detail}")]
    rows.append(("step", _of_steps(status)))
    if status.loss is not None:
        age = "" if status.logged_age is None else f", logged {render_duration(status.logged_age)} ago"
        rows.append(("loss", f"{status.loss:.4f}{age}"))
    if status.tokens_per_second is not None:
        eta = "" if status.eta_seconds is None else f", {render_duration(status.eta_seconds)} to go"
        rows.append(("speed", f"{render_count(status.tokens_per_second)} tok/s{eta}"))
    if status.goodput is not None:
        rows.append(("goodput", f"{100 * status.goodput:.1f} %"))
    rows.append(("saved", _saved(status)))
    rows += [("queued", f"job {job.id} {job.state.lower()}") for job in status.jobs[1:]]
    rows.append(("restarts", str(len(status.restarts))))
    rows += [("", _render_restart(restart)) for restart in status.restarts[-SHOWN_RESTARTS:]]
    rows += [("note", note) for note in status.notes[-SHOWN_NOTES:]]
    return "\n".join(f"{label:<10}{_plain(text)}" for label, text in rows)


def _of_steps(status: RunStatus) -> str:
    if not status.steps:
        return f"{status.step:,}"
    return f"{status.step:,} of {status.steps:,} ({100 * status.step / status.steps:.3g} %)"


def _saved(status: RunStatus) -> str:
    if status.saved_step is None:
        return "nothing yet"
    age = "" if status.saved_age is None else f", {render_duration(status.saved_age)} ago"
    return f"step {status.saved_step:,}{age}{', verified' if status.saved_verified else ''}"


def _render_restart(restart: Restart) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(restart.at))
    back = f"step {restart.back_to:,}"
    if restart.reached is not None and restart.reached > restart.back_to:
        back = f"step {restart.reached:,}, back to {restart.back_to:,}"
    return f"{when}  {back}: {restart.how}. {restart.reason}"


def _row(status: RunStatus) -> list[str]:
    return [
        status.run,
        status.state,
        f"{status.step:,}/{status.steps:,}" if status.steps else f"{status.step:,}",
        "-" if status.loss is None else f"{status.loss:.4f}",
        "-" if status.tokens_per_second is None else render_count(status.tokens_per_second),
        "-" if status.eta_seconds is None else render_duration(status.eta_seconds),
        "-" if status.goodput is None else f"{100 * status.goodput:.1f} %",
        "-" if status.saved_age is None else f"{render_duration(status.saved_age)} ago",
        str(len(status.restarts)),
        status.detail,
    ]


def _plain(text: str) -> str:
    """Nothing that a terminal would obey."""
    return text if text.isprintable() else ascii(text)[1:-1]
