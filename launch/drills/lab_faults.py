"""The faults that `gptdist drill --lab` adds: nodes, networks and Slurm itself.

Each is a function that strikes a job and tells how it was noticed, or raises Unexpected.
"""

import random
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.drills.certificate import Finding
from launch.drills.lab_stage import LabStage, boot_lab
from launch.drills.same_run import Reference
from launch.drills.stage import Noticed, Unexpected
from launch.runs.attempts import Attempt

LOST_SECONDS = 10.0
"""Within which a node that is gone must be named: 5 s of silence, and a decision."""
SAVED_SECONDS = 15.0


@dataclass(frozen=True)
class LabFault:
    """`title`: in the certificate."""

    title: str
    happen: Callable[[LabStage], Noticed]


def _kill_node(stage: LabStage) -> Noticed:
    """That of the last ranks: its power fails."""
    stage.submit()
    stage.strike(lambda: stage.lab.kill_node(_number(stage.hosts()[-1])))
    return _goes_on_without(stage, "node2")


def _cut_link(stage: LabStage) -> Noticed:
    """Its processes live on and reach nobody."""
    stage.submit()
    stage.strike(lambda: stage.lab.cut_cable(_number(stage.hosts()[-1])))
    return _goes_on_without(stage, "node2")


def _kill_first_node(stage: LabStage) -> Noticed:
    """That of the lead and the batch script: nobody is left to decide, so Slurm does."""
    stage.submit()
    stage.strike(lambda: stage.lab.kill_node(_number(stage.hosts()[0])))
    first = _restarted(stage)
    return stage.noticed(first)


def _kill_slurmd(stage: LabStage) -> Noticed:
    """Of the last node. Slurm takes the node for dead, though its ranks are well."""
    stage.submit()
    host = "node2"
    stage.strike(lambda: stage.kill("slurmd", host))
    try:
        return stage.noticed(_restarted(stage))
    finally:
        stage.lab.kill_node(_number(host))  # and it is switched on again for the next fault


def _preempted(stage: LabStage) -> Noticed:
    """As Slurm does: TERM to the batch script, some time before the end."""
    stage.submit()
    stage.strike(lambda: stage.lab.run("scancel", "--batch", "--signal=TERM", stage.job).expect())
    return _saved_and_requeued(stage)


def _requeued(stage: LabStage) -> Noticed:
    """By an administrator, without a warning worth the name."""
    stage.submit()
    stage.strike(lambda: stage.lab.run("scontrol", "requeue", stage.job).expect())
    return stage.noticed(_restarted(stage))


def _time_limit(stage: LabStage) -> Noticed:
    """The run saves before the time is over, and goes on in the next allocation."""
    # Slurm may signal up to a minute early.
    stage.submit("cluster.time_limit=2m", "cluster.signal_before_limit=30s", pace_seconds=5.0)
    return _saved_and_requeued(stage)


def _kill_srun(stage: LabStage) -> Noticed:
    stage.submit()
    stage.strike(lambda: stage.kill("srun", stage.hosts()[0]))
    return stage.noticed(_restarted(stage))


def _kill_script(stage: LabStage) -> Noticed:
    """The job has failed then, and is submitted again by hand."""
    stage.submit()
    stage.strike(lambda: stage.kill("slurm_script", stage.hosts()[0]))
    return stage.noticed(_restarted(stage))


LAB_FAULTS: dict[str, LabFault] = {
    "kill-node": LabFault("a node that dies", _kill_node),
    "kill-first-node": LabFault("the node of the batch script dies", _kill_first_node),
    "cut-link": LabFault("a cut network link", _cut_link),
    "kill-slurmd": LabFault("kill -9 of a node's slurmd", _kill_slurmd),
    "preempted": LabFault("preemption: TERM to the job, and requeued", _preempted),
    "requeued": LabFault("scontrol requeue without a warning", _requeued),
    "time-limit": LabFault("a time limit shorter than the run", _time_limit),
    "kill-srun": LabFault("kill -9 of srun", _kill_srun),
    "kill-script": LabFault("kill -9 of the batch script", _kill_script),
}


def drill_lab(names: list[str], reference: Reference, seed: int, work_dir: Path) -> Iterator[Finding]:
    """One after the other on one lab."""
    with boot_lab(work_dir / "lab") as lab:
        for name in names:
            with tempfile.TemporaryDirectory(dir=work_dir) as folder:
                stage = LabStage(lab, Path(folder) / name, reference, random.Random(f"{seed}/{name}"))
                yield stage.finding(LAB_FAULTS[name].title, LAB_FAULTS[name].happen)


def _goes_on_without(stage: LabStage, host: str) -> Noticed:
    """The host is named in time, and the job goes on on others."""
    attempts = stage.await_end()
    noticed = stage.noticed(attempts[0])
    if attempts[0].culprits != (host,) or not re.search(rf"lost {host} with rank", noticed.words):
        raise Unexpected(f"{host} was not named: {noticed.words}, {attempts[0].culprits}")
    if noticed.after is None or noticed.after > LOST_SECONDS:
        raise Unexpected(f"it was noticed only after {noticed.after} s")
    if host in attempts[1].hosts:
        raise Unexpected(f"the job went on with {host}")
    return noticed


def _saved_and_requeued(stage: LabStage) -> Noticed:
    first = _restarted(stage)
    noticed = stage.noticed(first)
    if first.saved_step is None or first.saved_step != first.last_step or first.action != "requeue":
        raise Unexpected(f"it was not saved where it was: {first}")
    if noticed.after is not None and noticed.after > SAVED_SECONDS:
        raise Unexpected(f"it was over only after {noticed.after} s")
    return noticed


def _restarted(stage: LabStage) -> Attempt:
    """The attempt that was struck; there is another after it."""
    attempts = stage.await_end()
    if len(attempts) < 2:
        raise Unexpected("the fault has not struck")
    return attempts[0]


def _number(host: str) -> int:
    return int(host.removeprefix("node"))
