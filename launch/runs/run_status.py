"""In what state a run is, from its files and its jobs in the queue. Pure: reads no file and asks nobody."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from gptdist.errors import EXIT_DO_NOT_REQUEUE, EXIT_RESUMABLE, EXIT_USER_MISTAKE
from launch.runs.attempts import Attempt
from launch.runs.goodput import goodput
from launch.runs.run_files import RunFiles
from launch.cluster.slurm_queue import QueuedJob

SILENT_SECONDS = 120.0
SILENT_STEPS = 20
"""A run outside Slurm that wrote nothing for so long, and for so many of its steps, may have been killed."""
_GOES_ON = ("queued", "requeued", "starting", "running", "ending")
_REASONS = {
    "Resources": "for nodes to become free",
    "Priority": "behind jobs of higher priority",
    "Dependency": "for the job before it in the chain",
    "BeginTime": "for its time: Slurm holds a requeued job for a while",
    "JobHeldUser": "held; `scontrol release` lets it go",
    "JobHeldAdmin": "held by an administrator",
    "QOSMaxJobsPerUserLimit": "for other jobs of this user to end (a limit of the QOS)",
    "AssocGrpGRES": "for GPUs of the account to become free",
    "AssocMaxJobsLimit": "for other jobs of this account to end (a limit)",
    "ReqNodeNotAvail": "for nodes that are down or reserved",
    "PartitionDown": "for its partition, which is down",
    "PartitionInactive": "for its partition, which takes no jobs now",
    "PartitionTimeLimit": "in vain: its time limit is longer than the partition allows",
    "launch failed requeued held": "held, because Slurm could not start it; `scontrol release` tries again",
}


@dataclass(frozen=True)
class Restart:
    """An attempt that was not the last: `reached` the step where it ended, and the next one went `back_to` that one."""

    at: float
    reached: int | None
    back_to: int
    how: str
    reason: str
    hosts: tuple[str, ...]


@dataclass(frozen=True)
class RunStatus:
    """One run. `state`: queued, starting, running, requeued, done, stopped, failed, lost, silent or new; `detail` says
    more in a sentence. Times are seconds, `age`s count back from now; what is not known is None."""

    run: str
    state: str
    detail: str
    step: int
    steps: int | None
    loss: float | None
    tokens_per_second: float | None
    eta_seconds: float | None
    goodput: float | None
    logged_age: float | None
    saved_step: int | None
    saved_age: float | None
    saved_verified: bool
    jobs: tuple[QueuedJob, ...]
    restarts: tuple[Restart, ...]
    notes: tuple[str, ...]


def build_status(files: RunFiles, queue: Sequence[QueuedJob] | None, now: float) -> RunStatus:
    """`queue`: the user's jobs, None where Slurm is not here or does not answer."""
    jobs = jobs_of(files, queue or ())
    state, detail = _state(files, jobs, queue is not None, now)
    alive = state in ("running", "starting")
    step = _step(files, state)
    speed = files.latest.get("speed/tokens_per_second") if alive and files.latest else None
    logged = files.latest.get("time")
    return RunStatus(
        run=str(files.run_dir),
        state=state,
        detail=detail,
        step=step,
        steps=files.steps,
        loss=files.latest.get("train/loss"),
        tokens_per_second=speed,
        eta_seconds=_eta(files.latest, now) if state == "running" else None,
        goodput=goodput(files.log, files.attempts, now if state in _GOES_ON else files.last_word or now),
        logged_age=None if logged is None else max(0.0, now - logged),
        saved_step=None if files.saved is None else files.saved.step,
        saved_age=None if files.saved is None or files.saved.created is None else max(0.0, now - files.saved.created),
        saved_verified=files.saved is not None and files.saved.verified,
        jobs=jobs,
        restarts=_restarts(files.attempts),
        notes=tuple(f"{note.kind}: {note.text}" for note in files.notes),
    )


def jobs_of(files: RunFiles, queue: Sequence[QueuedJob]) -> tuple[QueuedJob, ...]:
    """The run's jobs, those that run first: those of its attempts, and those whose script is in its folder."""
    allocations = {attempt.allocation for attempt in files.attempts}
    own = [job for job in queue if f"slurm {job.id}" in allocations or job.is_of(files.run_dir)]
    return tuple(sorted(own, key=lambda job: (job.waits, len(job.id), job.id)))


def _state(files: RunFiles, jobs: Sequence[QueuedJob], asked: bool, now: float) -> tuple[str, str]:
    last = files.attempts[-1] if files.attempts else None
    if jobs and not jobs[0].waits:
        return _of_active_job(jobs[0], last, bool(files.log))
    if jobs:
        return ("queued" if last is None else "requeued"), f"job {jobs[0].id} waits {_waits_for(jobs[0])}"
    if last is None:
        return _without_records(files, now)
    if last.ended is None:
        return _without_an_end(files, last, asked, now)
    return _ended(last)


def _of_active_job(job: QueuedJob, last: Attempt | None, has_log: bool) -> tuple[str, str]:
    on = f"job {job.id} on {job.hosts or 'no nodes'}"
    left = f", {job.time_left} left" if job.time_left not in ("", "UNLIMITED", "INVALID") else ""
    if job.state == "COMPLETING":
        return "ending", f"{on} is ending"
    if job.state != "RUNNING":
        return job.state.lower(), f"{on} is {job.state.lower()} ({job.reason})"
    unwatched = last is None and has_log
    begun = last is not None and last.allocation == f"slurm {job.id}" and last.ended is None
    return ("running" if begun or unwatched else "starting"), f"{on}{left}"


def _waits_for(job: QueuedJob) -> str:
    # Slurm adds details: "ReqNodeNotAvail, UnavailableNodes:node7"
    known = _REASONS.get(job.reason) or _REASONS.get(job.reason.split(",")[0])
    start = f"; expected to start {job.start}" if job.start else ""
    return f"{known or f'({job.reason})'}{start}"


def _without_records(files: RunFiles, now: float) -> tuple[str, str]:
    """Ranks under torchrun or mpirun, which nobody watches, or nothing yet."""
    if not files.log:
        return "new", "no step was made yet"
    if files.steps is not None and files.log[-1].step >= files.steps:
        return "done", "its last step is done"
    return _by_age(files, now, "its ranks were started without a watcher")


def _without_an_end(files: RunFiles, last: Attempt, asked: bool, now: float) -> tuple[str, str]:
    if last.allocation.startswith("slurm "):
        job = last.allocation.removeprefix("slurm ")
        if asked:
            return "lost", f"job {job} is no longer in Slurm's queue, and ended without a word"
        return _by_age(files, now, f"job {job}; Slurm does not answer here")
    where = f"on {', '.join(last.hosts)}"
    if files.alive is False:
        return "lost", f"{where}; its process is gone, and ended without a word"
    return ("running", where) if files.alive else _by_age(files, now, where)


def _by_age(files: RunFiles, now: float, where: str) -> tuple[str, str]:
    age = now - (files.last_word or now)
    limit = max(SILENT_SECONDS, SILENT_STEPS * (files.log[-1].step_seconds if files.log else 0.0))
    if age > limit:
        return "silent", f"{where}; it wrote nothing for {age:.0f} s, so it was probably killed"
    return ("running" if files.log else "starting"), where


def _ended(last: Attempt) -> tuple[str, str]:
    reason = last.reason or f"exit code {last.exit_code}"
    if last.action == "done":
        return "done", "its last step is done"
    if last.action == "stop" and last.exit_code == EXIT_RESUMABLE:
        return "stopped", last.reason or "it was asked to (a STOP file, or train.stop_after)"
    if last.exit_code == EXIT_USER_MISTAKE:
        return "failed", f"a mistake to mend: {reason}"
    if last.exit_code == EXIT_DO_NOT_REQUEUE:
        return "failed", f"given up, since a requeue would not help: {reason}"
    if last.action in ("requeue", "restart in place"):
        return "lost", f"it was to go on ({last.action}), and has no job in the queue: {reason}"
    return "failed", reason


def _step(files: RunFiles, state: str) -> int:
    """The last step that counts: of a run that makes none now, what is saved."""
    logged = int(files.latest.get("step", 0))
    last = files.attempts[-1] if files.attempts else None
    if last is None:
        return logged
    if state == "done":
        return last.last_step or logged
    if state == "lost" or last.ended is not None:
        return files.saved.step if files.saved else last.saved_step or 0
    return logged if files.latest.get("time", 0.0) > last.began else last.start_step


def _eta(latest: dict[str, Any], now: float) -> float | None:
    eta = latest.get("speed/eta_seconds")
    return None if eta is None else max(0.0, eta - (now - latest["time"]))


def _restarts(attempts: Sequence[Attempt]) -> tuple[Restart, ...]:
    return tuple(
        Restart(
            at=after.began,
            reached=before.last_step,
            back_to=after.start_step,
            how=_how(before, after),
            reason=before.reason or "it ended without a word",
            hosts=after.hosts,
        )
        for before, after in pairwise(attempts)
    )


def _how(before: Attempt, after: Attempt) -> str:
    if before.allocation == after.allocation and before.restart == after.restart:
        return "restarted in place"
    if before.action in ("stop", "done"):
        return "started again"
    gone = sorted(set(before.hosts) - set(after.hosts))
    without = f" without {', '.join(gone)}" if gone and set(gone) & set(before.culprits) else ""
    same_job = before.allocation == after.allocation
    return f"requeued{without}" if same_job else f"went on in {after.allocation}{without}"
