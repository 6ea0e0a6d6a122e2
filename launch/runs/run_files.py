"""What a run's folder says of the run, to whoever may read it: how far it is, what it saved, what was tried.

Knows the files that ranks and their launcher leave there. Reads only, and asks no rank and no Slurm.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from gptdist.checkpoint.folder import step_folders
from gptdist.checkpoint.listing import summarize
from gptdist.config.load import load_run
from gptdist.config.sections import RunConfig
from gptdist.errors import ConfigError, GptdistError, LaunchError
from launch.runs.attempts import ATTEMPTS_FILE, Attempt, Note, read_attempts, read_notes
from launch.runs.goodput import LoggedStep
from launch.ranks.run_lock import holder_is_alive

CONFIG_FILES = ("config.yaml", "job.yaml")
"""As the run last began, and as it was submitted."""
METRICS_FILE = "metrics.jsonl"
MARKS = (*CONFIG_FILES, METRICS_FILE, ATTEMPTS_FILE)
"""A folder with one of these is a run's."""


@dataclass(frozen=True)
class SavedStep:
    """The newest checkpoint that is whole. `created`: seconds since the epoch; `verified`: read again, every byte."""

    step: int
    path: Path
    created: float | None
    verified: bool


@dataclass(frozen=True)
class RunFiles:
    """`steps`: of the whole run; `latest`: the values last logged with a step's loss, empty before the first;
    `alive`: whether the process that leads it runs, None where that cannot be told from here. `min_nodes`: fewer than
    it asks for, with which it goes on."""

    run_dir: Path
    steps: int | None
    log: tuple[LoggedStep, ...]
    latest: dict[str, Any]
    saved: SavedStep | None
    attempts: tuple[Attempt, ...]
    notes: tuple[Note, ...]
    alive: bool | None = None
    min_nodes: int | None = None

    @property
    def concerns_slurm(self) -> bool:
        """Whether jobs of Slurm's may be the run's: not where it was only ever started by hand."""
        return not self.attempts or any(attempt.allocation.startswith("slurm ") for attempt in self.attempts)

    @property
    def is_complete(self) -> bool:
        """Whether the last step is saved."""
        return self.saved is not None and self.steps is not None and self.saved.step >= self.steps

    @property
    def last_word(self) -> float | None:
        """When the run last wrote anything that we read."""
        moments = [line.time for line in self.log[-1:]]
        moments += [attempt.ended or attempt.began for attempt in self.attempts[-1:]]
        return max(moments, default=None)


def is_run(folder: Path) -> bool:
    """Whether the folder is a run's."""
    return any((folder / name).is_file() for name in MARKS)


def find_runs(folder: Path) -> list[Path]:
    """The runs right below `folder` and one level further down, by name; none where there is no folder."""
    try:
        below = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    except OSError:
        return []
    runs = []
    for path in below:
        try:
            runs += [path] if is_run(path) else [inner for inner in sorted(path.iterdir()) if is_run(inner)]
        except OSError:
            continue
    return runs


def read_run(run_dir: Path) -> RunFiles:
    """Everything; what is missing or unreadable is empty. Raises LaunchError where there is no run."""
    if not is_run(run_dir):
        raise LaunchError(
            f"{run_dir} is no run's folder: none of {', '.join(MARKS)} is in it. Give the folder that launch.run_dir "
            "names."
        )
    checkpoints_dir, steps = run_dir / "checkpoints", None
    config = _read_config(run_dir)
    if config is not None:
        steps = config.train.steps
        checkpoints_dir = Path(config.checkpoint.dir) if config.checkpoint.dir else checkpoints_dir
    rows = [row for row in _metrics(run_dir / METRICS_FILE) if "train/loss" in row]
    log = tuple(
        LoggedStep(row["time"], row["step"], row["speed/step_seconds"]) for row in rows if "speed/step_seconds" in row
    )
    return RunFiles(
        run_dir,
        steps,
        log,
        rows[-1] if rows else {},
        _newest(checkpoints_dir),
        tuple(read_attempts(run_dir)),
        tuple(read_notes(run_dir)),
        holder_is_alive(run_dir),
        config.launch.min_nodes if config else None,
    )


def _read_config(run_dir: Path) -> RunConfig | None:
    for name in CONFIG_FILES:
        try:
            return load_run(run_dir / name).config
        except ConfigError:  # it is not there yet, or of another version
            continue
    return None


def _metrics(path: Path) -> Iterator[dict[str, Any]]:
    try:
        content = path.read_bytes()
    except OSError:
        return
    for line in content.split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:  # torn
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get("time"), int | float):
            yield row


def _newest(checkpoints_dir: Path) -> SavedStep | None:
    try:
        folders = step_folders(checkpoints_dir)
    except OSError:
        return None
    for folder in folders:
        try:
            summary = summarize(folder, verify=False, trust_others=True)
        except (GptdistError, OSError):  # it is being deleted
            continue
        if summary.ok:
            return SavedStep(summary.step, folder, _moment(summary.created), summary.verified is not None)
    return None


def _moment(written: str | None) -> float | None:
    try:
        moment = datetime.fromisoformat(written or "").timestamp()
    except ValueError:
        return None
    return moment if math.isfinite(moment) else None
