"""The ranks of a training run, wherever they are started by us: its folder held, failures on record, hangs noticed.

Knows what a supervised run is made of; what a rank does is given.
"""

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gptdist.config.check import check_run
from gptdist.config.load import LoadedRun
from gptdist.config.sections import RunConfig
from gptdist.errors import UserError
from gptdist.world import World
from launch.cluster.time_limit import TimeLimit, find_end
from launch.elastic import fit_layout
from launch.ranks.hang import LONGEST_SAVE_SECONDS, LONGEST_UPLOAD_SECONDS, WITH_FILES, Patience
from launch.ranks.lead import Supervision
from launch.ranks.local import show_verdict
from launch.ranks.place import Allocation, Place
from launch.ranks.process_io import bytes_moved
from launch.ranks.record import Record
from launch.ranks.run_lock import hold_run
from launch.ranks.slow_ranks import SlowRanks, rank_loads
from launch.ranks.supervise import run_agent
from launch.ranks.verdict import Verdict

PRELOAD = ("launch.train",)
LOCK_SECONDS = 240.0
"""A job that Slurm starts after a node was lost waits so long for the lock that the node held."""


def train_ranks(
    place: Place,
    loaded: LoadedRun,
    target: Callable[[World, Any], int],
    allocation: Allocation | None = None,
    *,
    fresh: bool,
) -> int:
    """Train on the ranks at `place`: `target(world, (loaded, fresh))` on each. Returns the exit code of the run; its
    error is shown once. Raises LaunchError.
    """
    allocation = allocation or Allocation()
    launch = loaded.config.launch
    fresh = fresh and allocation.restart == 0  # the second allocation of a run does not begin it once more
    supervision, refusal = None, None
    private_fds: tuple[int, ...] = ()
    patience = min(LOCK_SECONDS, launch.timeout / 2) if allocation.can_requeue else 0.0  # others wait launch.timeout
    with ExitStack() as held:
        if place.leads:
            try:
                lock = held.enter_context(hold_run(Path(launch.run_dir), allocation.name, patience))
                private_fds = () if lock is None else (lock,)
                supervision = _supervise(place, loaded, allocation, fresh)
            except UserError as error:
                refusal = Verdict(error.exit_code, str(error))  # which the other agents are waiting to hear
        verdict = run_agent(
            place,
            target,
            (loaded, fresh),
            preload=() if refusal else PRELOAD,
            port=launch.port,
            supervision=supervision,
            refusal=refusal,
            join_seconds=launch.timeout,
            private_fds=private_fds,
        )
    show_verdict(verdict)
    return verdict.exit_code


def _supervise(place: Place, loaded: LoadedRun, allocation: Allocation, fresh: bool) -> Supervision:
    config, launch = loaded.config, loaded.config.launch
    fit = fit_layout(config, place.world_size)
    layout = check_run(fit.config, fit.ranks, loaded.origins)
    return Supervision(
        Record(Path(launch.run_dir), allocation, can_restart=launch.restart, fresh=fresh),
        Patience(launch.hang_timeout, launch.timeout, _longest_waits(config)),
        SlowRanks(launch.slow_factor, rank_loads(config.model, layout)),
        TimeLimit(find_end(os.environ)),
    )


def _longest_waits(config: RunConfig) -> dict[str, float]:
    """Phases in which one rank, or all, may stand still for longer than launch.timeout: with a URL, or with a whole
    checkpoint where reading and writing cannot be seen."""
    waits = {"uploading": LONGEST_UPLOAD_SECONDS}
    if config.checkpoint.upload:
        waits["loading"] = LONGEST_UPLOAD_SECONDS
    if bytes_moved(os.getpid()) is None:
        waits = dict.fromkeys(WITH_FILES, LONGEST_SAVE_SECONDS) | waits
    return waits
