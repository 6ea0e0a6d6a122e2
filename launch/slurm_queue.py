"""What Slurm says of a user's jobs, and telling it to cancel some: `squeue` and `scancel`, in bounded time.

The only place that parses squeue. Plain columns rather than JSON: their meaning has not changed from version to
version, and the JSON of some versions is of all users' jobs, whatever was asked for.
"""

import getpass
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptdist.errors import LaunchError

_SECONDS = 10.0
"""A controller that does not answer in this time is busy or gone; the files of a run can be read without it."""
_COLUMNS = "%i\t%T\t%r\t%D\t%N\t%L\t%S\t%o"


@dataclass(frozen=True)
class QueuedJob:
    """One line of squeue. `state` and `reason` in Slurm's words; `hosts` in its notation, `(null)` and the like are "".

    `time_left`: of the time limit; `start`: when it began, or is expected to. `script`: of a batch job.
    """

    id: str
    state: str
    reason: str
    nodes: int
    hosts: str
    time_left: str
    start: str
    script: str

    @property
    def waits(self) -> bool:
        """It has no nodes: a cancel loses nothing."""
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "REQUEUE_FED", "RESV_DEL_HOLD")

    def is_of(self, run_dir: Path) -> bool:
        """Whether its batch script is in the folder of the run."""
        return bool(self.script) and os.path.realpath(os.path.dirname(self.script)) == os.path.realpath(run_dir)


def read_queue(user: str | None = None) -> list[QueuedJob] | None:
    """The unfinished jobs of `user` (None: this one); None where this machine has no Slurm.

    Raises LaunchError where Slurm is here and does not answer; one that was never set up is as none.
    """
    words = ["squeue", "--noheader", f"--user={user or getpass.getuser()}", f"--format={_COLUMNS}"]
    try:
        done = _run(words)
    except FileNotFoundError:
        return None
    if done.returncode and "configuration source" in done.stderr:
        return None
    if done.returncode:
        raise LaunchError(f"squeue failed: {_one_line(done.stderr) or f'exit code {done.returncode}'}")
    return parse_queue(done.stdout)


def parse_queue(shown: str) -> list[QueuedJob]:
    """Of squeue's output in our columns; lines that are something else are passed over."""
    jobs = []
    for line in shown.splitlines():
        fields = line.split("\t", 7)  # the script's name is the last, and may contain anything but an end of line
        if len(fields) == 8 and fields[3].strip().isdecimal():
            known = ["" if field.strip() in ("(null)", "N/A", "None") else field.strip() for field in fields]
            jobs.append(QueuedJob(known[0], known[1], known[2], int(known[3]), *known[4:]))
    return jobs


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs, which are then not requeued. One that has ended meanwhile is no error. Raises LaunchError."""
    if not job_ids:
        return
    try:
        done = _run(["scancel", *job_ids])
    except FileNotFoundError:
        raise LaunchError("there is no scancel on this machine: run this on a login node of the cluster") from None
    trouble = _one_line(done.stderr)
    if done.returncode and "Invalid job id" not in trouble and "already completing or completed" not in trouble:
        raise LaunchError(f"scancel {' '.join(job_ids)} failed: {trouble or f'exit code {done.returncode}'}")


def _run(words: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"{words[0]} did not answer in {_SECONDS:g} s: the controller of the cluster is busy or down. Try again."
        ) from None
    except PermissionError as error:
        raise LaunchError(f"{words[0]} cannot be run: {error.strerror}") from None


def _one_line(text: str) -> str:
    return "; ".join(re.sub(r"^\w+: (error|fatal): ", "", line.strip()) for line in text.splitlines() if line.strip())
