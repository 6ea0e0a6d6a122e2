"""Slurm's own commands, called with a time limit and answered with one clear error where they refuse or do not answer.

Knows sinfo, sbatch and scontrol; the queue is `slurm_queue.py`'s. Must not know what a run or a cluster's file is.
"""

import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptdist.errors import SlurmRefused, SlurmUnavailable

ANSWER_SECONDS = 20.0
"""A query that takes longer is given up: Slurm's own clients try for a minute and more."""
SUBMIT_SECONDS = 60.0
PATIENCE_SECONDS = 10.0
POLL_SECONDS = 0.5

_STALE = re.compile(
    r"SLURM_(?!CONF$|CLUSTERS$|JWT$).*|OMPI_.*|PMIX?_.*|TORCHELASTIC_.*|(LOCAL_|GROUP_)?RANK|(LOCAL_)?WORLD_SIZE"
    r"|MASTER_(ADDR|PORT)"
)
_UNREACHABLE = re.compile(
    r"unable to contact slurm controller|connection refused|socket timed out|slurm_load_\w+ error: unable to contact"
    r"|zero bytes were transmitted|unable to establish|could not establish a configuration source|no route to host"
    r"|slurm backup controller in standby|protocol authentication error|unable to resolve|could not .*slurm\.conf",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Partition:
    """What nodes of one kind in a partition offer; a partition of several kinds of nodes is several of these.

    `gpus`: those of a node by type, "" where they have none. Sizes are those of a node; None: no limit.
    """

    name: str
    is_default: bool
    nodes: int
    max_nodes: int | None
    time_limit_seconds: float | None
    cpus: int
    memory_bytes: int
    gpus: Mapping[str, int]
    is_up: bool = True


def ask(
    command: Sequence[str], *, seconds: float | None = None, text: str | None = None
) -> "subprocess.CompletedProcess[str]":
    """What a command of Slurm's answers, whatever its exit code. Raises SlurmUnavailable where it cannot be asked."""
    program, seconds = command[0], seconds or ANSWER_SECONDS
    try:
        answer = subprocess.run(
            command, input=text or "", capture_output=True, text=True, errors="replace", timeout=seconds,
            env=clean_environment(os.environ), check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise SlurmUnavailable(
            f"there is no {program} on the PATH of this machine, so it is no login node of a Slurm cluster. Run this "
            "on one, or put Slurm's commands on the PATH (on some sites: module load slurm)."
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmUnavailable(_silent(program, f"did not answer within {seconds:g} s")) from None
    except OSError as error:
        raise SlurmUnavailable(f"{program} cannot be run: {error.strerror or error}.") from error
    if answer.returncode and _UNREACHABLE.search(answer.stderr):
        raise SlurmUnavailable(_silent(program, f"says: {said(answer.stderr)}"))
    return answer


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what an outer job or launcher told its own ranks: a job inherits its submitter's variables."""
    return {name: value for name, value in environment.items() if not _STALE.fullmatch(name)}


def said(stderr: str) -> str:
    """What a command complained of, on one line, without its own name and without a full stop."""
    lines = [
        re.sub(
            r"^(s\w+: )?(error: |fatal: )?(Batch job submission failed: |allocation failure: )?", "", line.strip()
        ).rstrip(".")
        for line in stderr.splitlines()
    ]
    return "; ".join(dict.fromkeys(line for line in lines if line)) or "nothing"


def find_partitions() -> list[Partition]:
    """All partitions that the user may see. Raises SlurmUnavailable."""
    answer = ask(["sinfo", "--noheader", "--all", "--format=%P|%D|%s|%l|%c|%m|%G|%a"])
    if answer.returncode:
        raise SlurmUnavailable(_silent("sinfo", f"says: {said(answer.stderr)}"))
    return [partition for line in answer.stdout.splitlines() if (partition := _parse_partition(line)) is not None]


def submit(script: Path, options: Sequence[str] = ()) -> str:
    """Submit a batch script; its job id. Raises SlurmRefused with what Slurm says, or SlurmUnavailable."""
    answer = ask(["sbatch", "--parsable", *options, str(script)], seconds=SUBMIT_SECONDS)
    job_id = answer.stdout.strip().split(";")[0]
    if answer.returncode or not re.fullmatch(r"\d+", job_id):
        raise SlurmRefused(said(answer.stderr))
    return job_id


def test_only(script: str) -> str:
    """What `sbatch --test-only` says of the text of a script, which is not submitted. Raises like `submit`."""
    answer = ask(["sbatch", "--test-only"], seconds=SUBMIT_SECONDS, text=script)
    if answer.returncode:
        raise SlurmRefused(said(answer.stderr))
    return said(answer.stderr or answer.stdout)


def requeue(job_id: str) -> None:
    """Have a running job start again later. Raises SlurmRefused, or SlurmUnavailable."""
    answer = ask(["scontrol", "requeue", job_id])
    if answer.returncode:
        raise SlurmRefused(
            f"Slurm does not requeue job {job_id}: {said(answer.stderr)}. Where that is forbidden, submit with --chain."
        )


def exclude_nodes(job_id: str, hosts: Sequence[str], min_nodes: int | None = None) -> list[str]:
    """Have a waiting job do without these nodes, besides those that it already does without; which those are now.

    Never without so many that fewer than `min_nodes` are left for it: then it would wait for ever. Those left out first
    may come back first. None: as many as Slurm says; of a requeued job, those are as many as it had.

    Just after a requeue the job is still ending and cannot be changed: it is tried for some seconds. Raises like
    `requeue`.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        job = ask(["scontrol", "show", "job", "--oneliner", job_id]).stdout
        before = re.search(r"\bExcNodeList=(\S+)", job)
        names = _host_names(before.group(1)) if before and before.group(1) != "(null)" else []
        names = list(dict.fromkeys([*names, *(host.partition(".")[0] for host in hosts)]))
        names = _dispensable(job, names, min_nodes)
        answer = ask(["scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(names)}"])
        if not answer.returncode:
            return names
        if time.monotonic() > deadline:
            raise SlurmRefused(said(answer.stderr))
        time.sleep(POLL_SECONDS)


def _host_names(node_list: str) -> list[str]:
    """Of Slurm's notation for many."""
    return ask(["scontrol", "show", "hostnames", node_list]).stdout.split() or [node_list]


def _dispensable(job: str, names: list[str], min_nodes: int | None) -> list[str]:
    """The last of `names` that a job, as scontrol shows it, can do without in its partition; all where that is not
    known."""
    partition, nodes_of_job = re.search(r"\bPartition=(\S+)", job), re.search(r"\bNumNodes=(\d+)", job)
    if partition is None or nodes_of_job is None:
        return names
    shown = ask(["sinfo", "--noheader", "--Node", f"--partition={partition.group(1)}", "--format=%N"])
    nodes = set(shown.stdout.split())
    if not nodes:
        return names
    there = [name for name in names if name in nodes]  # of a name that it does not know, Slurm would refuse all
    spare = max(0, len(nodes) - (min_nodes or int(nodes_of_job.group(1))))
    return there[max(0, len(there) - spare) :]


def parse_time(text: str) -> float | None:
    """Seconds of Slurm's `2-00:00:00`, `12:00:00`, `30:00` or `30` (minutes); None for no limit."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is None:
        return None
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:  # days-hours[:minutes[:seconds]]
        numbers += [0] * (3 - len(numbers))
    elif len(numbers) == 1:
        numbers = [0, numbers[0], 0]
    elif len(numbers) == 2:
        numbers = [0, *numbers]
    hours, minutes, seconds = numbers
    return float(((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds)


def render_time(seconds: float) -> str:
    """Slurm's `D-HH:MM:SS`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}-{hour:02}:{minute:02}:{second:02}"


def _parse_partition(line: str) -> Partition | None:
    fields = line.strip().split("|")
    if len(fields) != 8:
        return None
    name, nodes, sizes, limit, cpus, memory, gres, available = fields
    largest = sizes.rpartition("-")[2]
    return Partition(
        name.rstrip("*"),
        name.endswith("*"),
        _leading_number(nodes),
        int(largest) if largest.isdecimal() else None,
        parse_time(limit),
        _leading_number(cpus),
        _leading_number(memory) << 20,
        _parse_gpus(gres),
        available == "up",
    )


def _parse_gpus(gres: str) -> dict[str, int]:
    """`gpu:h100:8(S:0-1),gpu:2,nvme:1` gives {"h100": 8, "": 2}."""
    gpus: dict[str, int] = {}
    for part in re.sub(r"\([^)]*\)", "", gres).split(","):
        kind, *rest = part.split(":")
        if kind == "gpu" and rest:
            count = _leading_number(rest[-1]) if rest[-1][:1].isdecimal() else 1
            gpu_type = rest[0] if len(rest) == 2 or not rest[0].isdecimal() else ""
            gpus[gpu_type] = gpus.get(gpu_type, 0) + count
    return gpus


def _leading_number(text: str) -> int:
    """Of `4` and of `4+`, which sinfo prints for several kinds of nodes at once."""
    match = re.match(r"\d+", text.strip())
    return int(match.group()) if match else 0


def _silent(program: str, what: str) -> str:
    return (
        f"Slurm's controller could not be asked: {program} {what}. Try `scontrol ping`; where it says DOWN, wait for "
        "the cluster's administrators; where SLURM_CONF names a missing file, unset or mend it."
    )
