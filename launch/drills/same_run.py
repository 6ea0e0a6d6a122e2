"""The proof that a run with faults is the run without: the same state to the bit, and each sample used once.

The state is that of the last checkpoints; the samples are what ranks noted of the tokens they took each step with,
against what the order of the data says. Knows no fault.
"""

from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np

from data_tools.corpus.order import RunOrder
from gptdist.checkpoint.compare import compare
from gptdist.checkpoint.folder import step_folders
from gptdist.checkpoint.read import Checkpoint
from gptdist.train.schedule import samples_at_step
from launch.drills.rank_faults import TrainedStep, read_trained, row_digest
from launch.drills.small_run import SmallRun


class Reference:
    """An untouched run that has ended, and what others of the same config and layout must come to."""

    def __init__(self, run: SmallRun) -> None:
        self.run = run
        self._rows = _rows_of_steps(run)

    def problem(self, other: SmallRun) -> str | None:
        """What is not the same in a run that has ended; None where all is."""
        return self.state_problem(other) or self.samples_problem(other)

    def state_problem(self, other: SmallRun) -> str | None:
        """Of the last checkpoint of `other`: weights, moments and all counters."""
        folders = step_folders(other.checkpoints_dir) if other.checkpoints_dir.is_dir() else []
        if not folders:
            return "no checkpoint was left"
        with _open(folders[0]) as found, _open(step_folders(self.run.checkpoints_dir)[0]) as wanted:
            comparison = compare(found, wanted)
        if comparison.tensors:
            names = ", ".join(difference.name for difference in comparison.tensors[:3])
            return f"{len(comparison.tensors)} of {comparison.equal + len(comparison.tensors)} tensors differ: {names}"
        others = [difference for difference in comparison.state if not difference.is_description]
        return f"the state differs: {others[0].path} is {others[0].one}, not {others[0].other}" if others else None

    def samples_problem(self, other: SmallRun) -> str | None:
        """Whether each step of `other` that counts took just its samples; a step that a restart took back and did again
        counts once, but may not have taken others either."""
        last: dict[int, dict[int, TrainedStep]] = {}
        for rank in range(other.ranks):
            for trained in read_trained(other.record_dir, rank):
                earlier = last.setdefault(trained.step, {}).setdefault(rank, trained)
                if earlier != trained:
                    return f"rank {rank} took step {trained.step} twice, with other samples"
        for step, wanted in self._rows.items():
            of_data_rank = {trained.data_rank: trained.rows for trained in last.get(step, {}).values()}
            if len(last.get(step, {})) < other.ranks:
                return f"step {step} was not taken by all ranks"
            if any(of_data_rank[trained.data_rank] != trained.rows for trained in last[step].values()):
                return f"in step {step} ranks of one data rank had other samples"
            used = Counter(row for rows in of_data_rank.values() for row in rows)
            if used != wanted:
                missing, extra = (wanted - used).total(), (used - wanted).total()
                return f"step {step} left out {missing} of its samples and used {extra} others"
        beyond = sorted(last.keys() - self._rows.keys())
        return f"step {beyond[0]} is beyond the last one" if beyond else None


def steps_lost(run: SmallRun) -> int:
    """Steps that were taken and had to be taken again, on the rank where they were most."""
    taken = [[trained.step for trained in read_trained(run.record_dir, rank)] for rank in range(run.ranks)]
    return max((len(steps) - len(set(steps)) for steps in taken), default=0)


def _rows_of_steps(run: SmallRun) -> dict[int, Counter[str]]:
    """The digests of the samples of every step, by the order of the data alone."""
    config = run.config()
    found = {}
    with closing(RunOrder(config, lambda step: samples_at_step(step, config.train, config.schedule))) as order:
        for step in range(1, config.train.steps + 1):
            bounds = (samples_at_step(at, config.train, config.schedule) for at in (step - 1, step))
            samples = np.arange(*bounds)
            rows = np.empty((len(samples), order.length + 1), dtype=np.int64)
            order.source.read(order.source.locate(samples), rows)
            found[step] = Counter(row_digest(row.tobytes()) for row in rows)
    return found


def _open(folder: Path) -> Checkpoint:
    return Checkpoint.open(folder, verify=True)
