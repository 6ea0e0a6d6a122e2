"""`gptdist logs RUN`: what the ranks of a run wrote, from the files in its folder, as they are or as they grow.

Knows how the files in `logs/` are named: `job-JOB-rank-R.out` of the ranks of a Slurm job, `job-JOB.out` of its script.
"""

import argparse
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from gptdist.errors import EXIT_DONE, LaunchError, SlurmUnavailable
from launch.cluster.slurm_queue import read_queue
from launch.runs.attempts import read_attempts
from launch.runs.run_files import read_run
from launch.runs.run_status import jobs_of

LOGS_DIR = "logs"
POLL_SECONDS = 0.5
QUEUE_SECONDS = 10.0
"""A run that has ended is looked for in the queue so often: it may have been submitted again."""
_NAME = re.compile(r"job-(?P<job>\d+)(-rank-(?P<rank>\d+))?\.out")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class LogFile:
    """`global_rank`: None for the job's script. In the order in which they began."""

    job: int
    global_rank: int | None
    path: Path

    @property
    def place(self) -> tuple[int, int]:
        return self.job, -1 if self.global_rank is None else self.global_rank


def main(args: argparse.Namespace) -> int:
    """Print what one rank wrote, or rank 0 and the script; with --follow, until the run is over."""
    run_dir: Path = args.run
    read_run(run_dir)
    queued_until = 0.0
    if not log_files(run_dir, args.rank):
        raise LaunchError(_nothing(run_dir, args.rank))
    shown: dict[Path, int] = {}
    last: Path | None = None
    while True:
        over = _is_over(run_dir)  # before reading: what was written before the end is then shown
        if args.follow and over:
            if time.monotonic() >= queued_until and _is_queued(run_dir):
                queued_until = time.monotonic() + QUEUE_SECONDS
            over = time.monotonic() >= queued_until
        for file in log_files(run_dir, args.rank):
            last = _print_new(file.path, shown, last)
        if not args.follow or over:
            return EXIT_DONE
        time.sleep(POLL_SECONDS)


def log_files(run_dir: Path, global_rank: int | None) -> list[LogFile]:
    """The files of one rank; None: of rank 0 and of the script."""
    try:
        paths = list((run_dir / LOGS_DIR).iterdir())
    except OSError:
        return []
    found = [parsed for path in paths if (parsed := _parse(path))]
    wanted = (None, 0) if global_rank is None else (global_rank,)
    return sorted((file for file in found if file.global_rank in wanted), key=lambda file: file.place)


def _parse(path: Path) -> LogFile | None:
    match = _NAME.fullmatch(path.name)
    if match is None:
        return None
    global_rank = None if match["rank"] is None else int(match["rank"])
    return LogFile(int(match["job"]), global_rank, path)


def _print_new(path: Path, shown: dict[Path, int], last: Path | None) -> Path | None:
    """What was added to the file since it was last shown, below its name where the file before was another."""
    out = sys.stdout.buffer
    with path.open("rb") as file:
        file.seek(shown.get(path, 0))
        while data := file.read(_CHUNK):
            if path != last:
                out.write(f"==> {path} <==\n".encode())
                last = path
            out.write(data)
        shown[path] = file.tell()
    out.flush()
    return last


def _is_over(run_dir: Path) -> bool:
    attempts = read_attempts(run_dir)
    return bool(attempts) and attempts[-1].action in ("done", "stop")


def _is_queued(run_dir: Path) -> bool:
    """Whether another job of the run waits or runs, or its last one once more, so that there is more to come."""
    files = read_run(run_dir)
    last = files.attempts[-1].allocation if files.attempts else None
    try:
        jobs = jobs_of(files, read_queue(str(run_dir.stat().st_uid)) or ())
    except SlurmUnavailable:
        return False
    return any(job.waits or f"slurm {job.id}" != last for job in jobs)


def _nothing(run_dir: Path, global_rank: int | None) -> str:
    folder = run_dir / LOGS_DIR
    if global_rank is not None and log_files(run_dir, None):
        ranks = sorted(
            {
                parsed.global_rank
                for path in folder.iterdir()
                if (parsed := _parse(path)) and parsed.global_rank is not None
            }
        )
        there = f"0 to {ranks[-1]}" if ranks else "none yet"
        return f"rank {global_rank} of {run_dir} has no log. Ranks with one: {there}."
    return (
        f"{run_dir} has no logs: {folder} has no file of a job's. A job that waits has none yet, and `gptdist train` "
        "writes to its own terminal."
    )
