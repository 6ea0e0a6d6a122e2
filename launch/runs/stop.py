"""`gptdist stop RUN`: the run saves and ends, and is not requeued.

Leaves the `STOP` file in the run's folder, which training answers after the step that it is at; jobs that only wait are
cancelled, and so is one that does not answer. Knows files, squeue and scancel; sends no signal to anyone.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

from gptdist.durable import write_durably
from gptdist.errors import EXIT_DONE, EXIT_FAILED, SlurmUnavailable, StorageError
from gptdist.monitor.console import render_duration
from gptdist.train.guards import STOP_FILE
from launch.runs.attempts import Attempt, read_attempts
from launch.runs.run_files import RunFiles, read_run
from launch.runs.run_status import build_status, jobs_of
from launch.cluster.slurm_queue import QueuedJob, cancel, read_queue

POLL_SECONDS = 1.0
QUEUE_SECONDS = 10.0
"""The queue is asked so often, and at once when the run's files say that it has ended: a controller has other users."""
CANCEL_SECONDS = 60.0
"""A cancelled job gets its time to end; Slurm kills what is left after its KillWait, 30 s by default."""


def main(args: argparse.Namespace) -> int:
    """Ask, wait for the answer as long as `args.patience`, then cancel; returns when the run has ended."""
    run_dir: Path = args.run
    files = read_run(run_dir)
    queue = _queue(run_dir, files)
    jobs = jobs_of(files, queue or ())
    # Those that wait first: with the running one gone, the next of a chain would begin.
    _cancel_waiting(jobs)
    active = [job for job in jobs if not job.waits]
    status = build_status(files, queue, time.time())
    if not active and status.state not in ("running", "starting", "silent"):
        if not jobs:
            print(f"nothing to stop: {run_dir} is {status.state} ({status.detail}).")
        print(_what_is_saved(files))
        return EXIT_DONE
    leave_stop_file(run_dir)
    print(f"asked {run_dir} to save and stop, after the step that it is at", flush=True)
    if _await_end(run_dir, files, args.patience):
        return EXIT_DONE
    return _give_up(run_dir, active, args.patience)


def leave_stop_file(run_dir: Path) -> None:
    """Raises StorageError."""
    try:
        write_durably(run_dir / STOP_FILE, b"gptdist stop\n")
    except OSError as error:
        raise StorageError(
            f"cannot write {run_dir / STOP_FILE}: {error.strerror or error}. Free some space, or run this as a user "
            "who may write there."
        ) from error


def _cancel_waiting(jobs: Sequence[QueuedJob]) -> None:
    waiting = [job.id for job in jobs if job.waits]
    if waiting:
        cancel(waiting)
        print(f"cancelled {_named(waiting)}, which waited", flush=True)


def _await_end(run_dir: Path, before: RunFiles, patience: float) -> bool:
    """Whether the run ended. Once it has answered, its save may take as long as it needs."""
    deadline = time.monotonic() + patience
    answered = False
    next_look = 0.0
    while time.monotonic() < deadline or answered:
        time.sleep(POLL_SECONDS)
        taken = not os.path.lexists(run_dir / STOP_FILE)
        if taken and not answered:
            answered = True
            print("it has answered, and saves", flush=True)
        attempts = read_attempts(run_dir)
        over = _has_ended(attempts) or (taken and not attempts)
        if not over and time.monotonic() < next_look:
            continue
        next_look = time.monotonic() + QUEUE_SECONDS
        jobs = _jobs(run_dir, before)
        _cancel_waiting(jobs)  # preempted in the middle of it: it must not come back
        if any(not job.waits for job in jobs):
            continue
        if over:
            (run_dir / STOP_FILE).unlink(missing_ok=True)  # it ended before it saw the file
            last = attempts[-1] if attempts else None
            print(f"ended: {last.reason}" if last and last.reason else "ended", flush=True)
            print(_what_is_saved(read_run(run_dir)))
            return True
    return False


def _jobs(run_dir: Path, files: RunFiles) -> tuple[QueuedJob, ...]:
    return jobs_of(files, _queue(run_dir, files) or ())


def _queue(run_dir: Path, files: RunFiles) -> list[QueuedJob] | None:
    """None for a run that has nothing to do with Slurm, where that does not answer. Raises SlurmUnavailable."""
    try:
        return read_queue(str(run_dir.stat().st_uid))
    except SlurmUnavailable:
        if files.concerns_slurm:
            raise
        return None


def _has_ended(attempts: Sequence[Attempt]) -> bool:
    last = attempts[-1] if attempts else None
    return last is not None and last.ended is not None and last.action != "restart in place"


def _give_up(run_dir: Path, active: Sequence[QueuedJob], patience: float) -> int:
    """Cancel what did not answer; outside Slurm there is nothing that could be done from here."""
    files = read_run(run_dir)
    waited = f"it did not answer in {render_duration(patience)}"
    if not active:
        print(f"{waited}; {run_dir / STOP_FILE} stays there and will stop it after its next step, or at its next start")
        print(_what_is_saved(files))
        return EXIT_FAILED
    ids = [job.id for job in active]
    print(f"{waited}, so {_named(ids)} is cancelled: what it did since its last save is lost", flush=True)
    cancel(ids)
    deadline = time.monotonic() + CANCEL_SECONDS
    while (jobs := _jobs(run_dir, files)) and time.monotonic() < deadline:
        _cancel_waiting(jobs)  # its last act was to requeue itself
        time.sleep(POLL_SECONDS)
    (run_dir / STOP_FILE).unlink(missing_ok=True)
    print(_what_is_saved(files))
    return EXIT_FAILED


def _what_is_saved(files: RunFiles) -> str:
    if files.saved is None:
        return "no step is saved"
    return f"step {files.saved.step:,} is saved in {files.saved.path}; the same command as before goes on from there"


def _named(job_ids: Sequence[str]) -> str:
    return f"job{'s' if len(job_ids) > 1 else ''} {', '.join(job_ids)}"
