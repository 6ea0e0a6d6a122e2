"""What Slurm says of a user's jobs, and telling it to cancel some: `squeue` and `scancel`, in bounded time.

The only place that parses squeue. Plain columns rather than JSON: their meaning has not changed from version to
version, and the JSON of some versions is of all users' jobs, whatever was asked for.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptdist.errors import LaunchError, SlurmUnavailable
from launch.cluster.slurm import ask, said

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
    """The unfinished jobs of `user`, a name or a number; None where this machine has no Slurm.

    `user` None: whoever runs this, by number: LOGNAME and USER may be another's. Raises SlurmUnavailable where Slurm is
    here and does not answer.
    """
    if shutil.which("squeue") is None:
        return None
    answer = ask(["squeue", "--noheader", f"--user={user or os.getuid()}", f"--format={_COLUMNS}"])
    if answer.returncode:
        raise SlurmUnavailable(f"squeue failed: {said(answer.stderr)}.")
    return parse_queue(answer.stdout)


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
    """Cancel jobs, which are then not requeued. One that has ended meanwhile is no error. Raises SlurmUnavailable, or
    LaunchError where Slurm refuses."""
    if not job_ids:
        return
    answer = ask(["scancel", *job_ids])
    trouble = said(answer.stderr)
    if answer.returncode and "Invalid job id" not in trouble and "already completing or completed" not in trouble:
        raise LaunchError(f"scancel {' '.join(job_ids)} failed: {trouble}.")
