"""A soak: whichever process of a run is killed at whichever moment, as often as asked; nothing may be lost.

A command that ends before the run's last step is started again, as a user would. A run that reached its end is proven,
and another one begins.
"""

import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from gptdist.errors import EXIT_DONE
from launch.drills.certificate import Finding
from launch.drills.rank_faults import read_ranks
from launch.drills.same_run import Reference, steps_lost
from launch.drills.small_run import Command, SmallRun
from launch.drills.stage import LIMIT_SECONDS

SOAK_STEPS = 300
LONGEST_WAIT_SECONDS = 3.0
"""Until the next kill, counted from the moment that there are ranks."""
LAUNCHER = "the launcher"
_LAUNCHER_SHARE = 0.2
_POLL_SECONDS = 0.05
_AT_ONCE_SHARE = 0.2  # so that some meet a launcher that has no ranks yet


def soak(kills: int, reference: Reference, seed: int, work_dir: Path) -> Finding:
    """Kill `kills` times, over as many runs as that takes."""
    started = time.perf_counter()
    draw = random.Random(f"{seed}/soak")
    victims: Counter[str] = Counter()
    ends: Counter[int | None] = Counter()
    runs, lost, problem = 0, 0, None
    while victims.total() < kills and problem is None:
        untouched = reference.run
        run = SmallRun(work_dir / f"soaked-{runs}", untouched.corpus, untouched.ranks, untouched.steps)
        run.prepare()
        problem = _soak_run(run, draw, kills, victims, ends) or reference.problem(run)
        runs, lost = runs + 1, lost + steps_lost(run)
    killed = ", ".join(f"{victim} {count}" for victim, count in sorted(victims.items()))
    codes = ", ".join(f"{code}: {count}" for code, count in ends.most_common())
    return Finding(
        f"kill -9 of any process at any moment (seed {seed})",
        victims.total(),
        f"{runs} runs; killed: {killed}; commands by exit code: {codes}",
        problem,
        seconds=time.perf_counter() - started,
        steps_lost=lost,
    )


def _soak_run(
    run: SmallRun, draw: random.Random, kills: int, victims: Counter[str], ends: Counter[int | None]
) -> str | None:
    """One run to its end, killed on the way; what went wrong."""
    while True:
        command = run.start()
        while command.is_running() and victims.total() < kills:
            at_once = draw.random() < _AT_ONCE_SHARE
            while not at_once and command.is_running() and not _living_ranks(run, command):
                time.sleep(_POLL_SECONDS)
            time.sleep(draw.uniform(0.0, LONGEST_WAIT_SECONDS))
            victim = _kill_one(run, command, draw)
            if victim is not None:
                victims[victim] += 1
        ended = command.wait(LIMIT_SECONDS)
        ends[ended.code] += 1
        if ended.code is None or ended.orphans:
            return f"a command {'left processes behind' if ended.orphans else 'hung'}:\n{ended.end()}"
        if ended.code == EXIT_DONE:
            return None


def _kill_one(run: SmallRun, command: Command, draw: random.Random) -> str | None:
    """Who was killed; None where there was nobody."""
    ranks = _living_ranks(run, command)
    if not ranks or draw.random() < _LAUNCHER_SHARE:
        victim, pid = LAUNCHER, command.pid
    else:
        global_rank = draw.choice(sorted(ranks))
        victim, pid = f"rank {global_rank}", ranks[global_rank]
    if not command.is_running():
        return None
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return victim
    return None


def _living_ranks(run: SmallRun, command: Command) -> dict[int, int]:
    """Processes by rank."""
    return {rank: pid for rank, pid in read_ranks(run.record_dir) if _is_child(pid, command.pid)}


def _is_child(pid: int, parent: int) -> bool:
    """Whether the process lives, and is that parent's: pids are used again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return fields[0] != "Z" and int(fields[1]) == parent
