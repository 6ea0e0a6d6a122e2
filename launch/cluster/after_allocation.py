"""What a job does when its ranks have ended: nothing more, be requeued without the nodes at fault, or give up.

Called by the run's batch script (slurm/job.sbatch), outside of any container. The last record of `attempts.jsonl` says
what is to be; srun's exit code counts only where there is none. Knows files and Slurm, not ranks.
"""

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gptdist.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_RESUMABLE,
    EXIT_USER_MISTAKE,
    LaunchError,
    SlurmRefused,
    SlurmUnavailable,
    StorageError,
)
from launch.cluster.slurm import exclude_nodes, requeue
from launch.cluster.slurm_queue import QueuedJob, cancel, read_queue
from launch.cluster.time_limit import find_end
from launch.ranks.rules import DONE, REQUEUE, STOP, Failure, decide
from launch.runs.attempts import Attempt, end, read_attempts
from launch.runs.run_files import RunFiles, read_run

ASKED_TO_STOP = tuple(128 + number for number in (signal.SIGUSR1, signal.SIGTERM))
"""What a shell says of an srun that such a signal ended before it had started any rank."""
CONTROLLER_SECONDS = 600.0
"""A controller that is down is asked again for so long: one that restarts, or its backup, is there in minutes."""
ASK_AGAIN_SECONDS = 10.0
NO_RANK = "no rank began to train"
KILLED = Failure("everything was killed at once, without a word: a node lost, or out of memory?", node_lost=True)


def main(args: argparse.Namespace) -> int:
    """Returns the exit code of the job."""
    run_dir: Path = args.run_dir
    job_id = os.environ.get("SLURM_JOB_ID")
    if job_id is None:
        raise LaunchError("after-allocation is for the batch script of a run, and SLURM_JOB_ID is not set.")
    last = settle(run_dir, f"slurm {job_id}", _restart_count(os.environ), args.srun_exit)
    _say(last.reason or "all ranks have ended")
    try:
        _follow_patiently(run_dir, job_id, last)
    except (LaunchError, SlurmRefused, SlurmUnavailable) as error:
        to_go_on = f" To go on: sbatch {shlex.quote(str(run_dir / 'job.sbatch'))}" if last.action == REQUEUE else ""
        _say(f"what comes next could not be arranged: {error}{to_go_on}")
    if last.action == REQUEUE:
        return EXIT_RESUMABLE
    return EXIT_DONE if last.action == DONE else EXIT_FAILED if last.exit_code is None else last.exit_code


def settle(run_dir: Path, allocation: str, restart: int, srun_exit: int) -> Attempt:
    """The last attempt of this allocation with how it ended; where the record lacks that, it is decided and added."""
    attempts = _read(run_dir)
    mine = [attempt for attempt in attempts if (attempt.allocation, attempt.restart) == (allocation, restart)]
    last = mine[-1] if mine else None
    if last is not None and last.action in (DONE, REQUEUE, STOP):
        return last
    if last is not None and last.ended is None:
        earlier, failure = attempts[:-1], KILLED
    else:
        earlier, failure = attempts, _failure_without_ranks(attempts, srun_exit)
        last = _nothing_began(attempts, allocation, restart, len(mine))
    ended = replace(last, ended=time.time())
    files = _files(run_dir)
    if failure is KILLED and files is not None and files.saved is not None:
        ended = replace(ended, saved_step=files.saved.step)  # nobody was left to say so
    if srun_exit == EXIT_DONE and files is not None and files.is_complete:  # on a disk too full for the record
        ended = replace(ended, exit_code=EXIT_DONE, action=DONE)
    else:
        ended = replace(ended, reason=failure.reason, failed=not failure.stopping)
        decision = decide([*earlier, ended], failure, can_restart=False, can_requeue=True)
        reason = f"{failure.reason}; {decision.why}" if decision.why else failure.reason
        ended = replace(ended, reason=reason, exit_code=decision.exit_code, action=decision.action)
    try:
        end(run_dir, ended)
    except StorageError as error:
        _say(f"this is not on record: {error}")
    return ended


def _read(run_dir: Path) -> list[Attempt]:
    try:
        return read_attempts(run_dir)
    except StorageError as error:
        _say(f"decided without the record: {error}")
        return []


def _files(run_dir: Path) -> RunFiles | None:
    """What the folder tells of progress; None where it cannot be read."""
    try:
        return read_run(run_dir)
    except (LaunchError, StorageError):
        return None


def _nothing_began(attempts: Sequence[Attempt], allocation: str, restart: int, generation: int) -> Attempt:
    saved = max((attempt.saved_step or attempt.start_step for attempt in attempts), default=0)
    return Attempt(allocation, restart, generation, (), 0, time.time(), saved)


def _failure_without_ranks(attempts: Sequence[Attempt], srun_exit: int) -> Failure:
    """Of an allocation in which srun ended before there was anything to record."""
    if srun_exit == EXIT_RESUMABLE:
        return Failure("the ranks ended to go on later, without a record of it", srun_exit, stopping=True)
    if srun_exit in ASKED_TO_STOP:
        return Failure(f"{NO_RANK} before the job was asked to end", EXIT_RESUMABLE, stopping=True)
    reason = f"{NO_RANK}: srun ended with exit code {srun_exit}; the job's log says more"
    if srun_exit == EXIT_USER_MISTAKE:
        return Failure(reason, srun_exit, deliberate=True)
    # What has worked before fails because of a node or of the cluster; what never has, because of itself.
    return Failure(reason, EXIT_FAILED, node_lost=bool(attempts))


def _follow_patiently(run_dir: Path, job_id: str, last: Attempt) -> None:
    """Do what the record says. A controller that does not answer must not end the run: nobody would start it again."""
    deadline = time.monotonic() + CONTROLLER_SECONDS
    while True:
        try:
            _follow(run_dir, job_id, last)
            return
        except SlurmUnavailable as error:
            if time.monotonic() > deadline:
                raise
            _say(f"asking again in {ASK_AGAIN_SECONDS:g} s: {error}")
        time.sleep(ASK_AGAIN_SECONDS)


def _follow(run_dir: Path, job_id: str, last: Attempt) -> None:
    jobs = read_queue() or []
    waiting = [job.id for job in jobs if job.waits and job.is_of(run_dir) and job.id != job_id]
    if last.action != REQUEUE:
        if waiting:
            cancel(waiting)
            _say(f"cancelled {', '.join(waiting)}, which would have gone on")
        return
    if waiting:
        _say(f"job {waiting[0]} goes on")
        for chained in waiting:
            _exclude(chained, last.culprits, run_dir)
        return
    own = next((job for job in jobs if job.id == job_id), None)
    if own is None or not _may_come_back(own, os.environ):
        _say("Slurm ends this job itself: someone cancelled it, or it is requeued already for a lost node")
        _exclude(job_id, last.culprits, run_dir)  # refused where it was cancelled
        return
    # Slurm ends this process soon after; until then the job cannot begin again.
    ignore_term()
    _say("requeued")
    requeue(job_id)
    _exclude(job_id, last.culprits, run_dir)


def _may_come_back(own: QueuedJob, environment: Mapping[str, str]) -> bool:
    """Whether the job still runs, or was ended by its time limit, not by someone who cancelled it."""
    end = find_end(environment)
    return own.state == "RUNNING" or (end is not None and time.time() >= end)


def _exclude(job_id: str, hosts: Sequence[str], run_dir: Path) -> None:
    if not hosts:
        return
    files = _files(run_dir)
    try:
        without = exclude_nodes(job_id, hosts, files.min_nodes if files else None)
    except (SlurmRefused, SlurmUnavailable) as error:
        _say(f"job {job_id} may get {', '.join(hosts)} again: {error}")
        return
    if without:
        _say(f"job {job_id} does without {', '.join(without)}")
    back = [host for host in hosts if host.partition(".")[0] not in without]
    if back:
        _say(f"job {job_id} may get {', '.join(back)} again: its partition has no other node for it")


def ignore_term() -> None:
    """A requeue ends the job that asks for it, TERM first; then there are seconds left."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _restart_count(environment: Mapping[str, str]) -> int:
    count = environment.get("SLURM_RESTART_COUNT", "")
    return int(count) if count.isdecimal() else 0


def _say(text: str) -> None:
    print(f"gptdist: {text}", file=sys.stderr, flush=True)
