"""The ranks of a training run, wherever they are started by us: its folder held, failures on record, hangs noticed.

Knows what a supervised run is made of; what a rank does is given.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptdist.config.check import check_run
from gptdist.config.load import LoadedRun
from gptdist.world import World
from launch.elastic import fit_layout
from launch.hang import Patience
from launch.lead import Supervision
from launch.local import show_verdict
from launch.place import Place
from launch.record import Allocation, Record
from launch.run_lock import hold_run
from launch.slow_ranks import SlowRanks, rank_loads
from launch.supervise import run_agent
from launch.time_limit import TimeLimit, find_end

PRELOAD = ("launch.train",)


def train_ranks(
    place: Place,
    loaded: LoadedRun,
    target: Callable[[World, Any], int],
    allocation: Allocation | None = None,
    *,
    fresh: bool,
) -> int:
    """Train on the ranks at `place`: `target(world, (loaded, fresh))` on each. Returns the exit code of the run; its
    error is shown once. Raises UserError.
    """
    allocation = allocation or Allocation()
    config, launch = loaded.config, loaded.config.launch
    run_dir = Path(launch.run_dir)
    fresh = fresh and allocation.restart == 0  # the second allocation of a run does not begin it once more
    with hold_run(run_dir, allocation.name) as lock:
        fit = fit_layout(config, place.world_size)
        layout = check_run(fit.config, fit.ranks, loaded.origins)
        supervision = Supervision(
            Record(run_dir, allocation, can_restart=launch.restart, fresh=fresh),
            Patience(launch.hang_timeout, launch.timeout),
            SlowRanks(launch.slow_factor, rank_loads(config.model, layout)),
            TimeLimit(find_end(os.environ)),
        )
        verdict = run_agent(
            place,
            target,
            (loaded, fresh),
            preload=PRELOAD,
            port=launch.port,
            supervision=supervision,
            join_seconds=launch.timeout,
            private_fds=() if lock is None else (lock,),
        )
    show_verdict(verdict)
    return verdict.exit_code
