"""Faults that end processes of a run: ranks that are killed, crash or leave, and the launcher itself.

Each is a function that strikes a run and tells how it was noticed, or raises Unexpected.
"""

import signal
from collections.abc import Callable

from gptdist.errors import EXIT_DO_NOT_REQUEUE, EXIT_DONE, EXIT_FAILED, EXIT_RESUMABLE
from launch.drills.rank_faults import Strike
from launch.drills.small_run import SAVE_INTERVAL
from launch.drills.stage import COMPUTING, DEATH_SECONDS, Noticed, Stage, Unexpected

KILLED = r"rank {rank} was killed by signal 9"


def dies(kind: str, said: str) -> Callable[[Stage], Noticed]:
    """A rank other than 0 ends by itself; `said` of it, with where it was. All ranks start again in place."""

    def happen(stage: Stage) -> Noticed:
        rank, step = stage.other_rank(), stage.step()
        stage.start(Strike(kind, (rank,), step, COMPUTING))
        stage.expect_code(EXIT_DONE)
        return stage.expect_said(f"{said.format(rank=rank)}.*{_at(step, COMPUTING)}", DEATH_SECONDS)

    return happen


def kill_rank_0(stage: Stage) -> Noticed:
    """The one that writes and prints."""
    step = stage.step()
    stage.start(Strike("kill", (0,), step, "optimizer step"))
    stage.expect_code(EXIT_DONE)
    return stage.expect_said(f"{KILLED.format(rank=0)}.*{_at(step, 'optimizer step')}", DEATH_SECONDS)


def kill_all(stage: Stage) -> Noticed:
    """At once; which of them is named is chance."""
    stage.start(Strike("kill all ranks", (stage.other_rank(),), stage.step(), COMPUTING))
    stage.expect_code(EXIT_DONE)
    return stage.expect_said(rf"{KILLED.format(rank='[0-9]+')}.*\(on {{host}}, in step \d+: ", DEATH_SECONDS)


def kill_in_save(stage: Stage) -> Noticed:
    """The third one of the run."""
    rank, step = stage.other_rank(), 3 * SAVE_INTERVAL + 1
    stage.start(Strike("kill", (rank,), step, "saving"))
    stage.expect_code(EXIT_DONE)
    return stage.expect_said(f"{KILLED.format(rank=rank)}.*{_at(step, 'saving')}", DEATH_SECONDS)


def kill_at_start(stage: Stage) -> Noticed:
    """Nothing ever worked, so nothing is tried again by itself."""
    rank = stage.other_rank()
    stage.start(Strike("kill", (rank,), 1, "loading"))
    stage.expect_code(EXIT_FAILED)
    return stage.expect_said(f"error: {KILLED.format(rank=rank)}", DEATH_SECONDS)


def kill_again(stage: Stage) -> Noticed:
    """A second time, while the ranks that were started again still load."""
    first = Strike("kill", (stage.other_rank(),), stage.step(), COMPUTING, generation=0)
    second = Strike("kill", (stage.other_rank(),), 0, "loading", generation=1)
    stage.start(first, second)
    stage.expect_code(EXIT_DONE)
    stage.expect_said(f"{KILLED.format(rank=first.global_ranks[0])}.*{_at(first.step, COMPUTING)}", DEATH_SECONDS)
    return stage.expect_said(f"{KILLED.format(rank=second.global_ranks[0])}.*: loading", DEATH_SECONDS, strike=1)


def kill_launcher(stage: Stage) -> Noticed:
    """Nobody is left to say anything: that nothing runs on is all there is to notice."""
    stage.start(Strike("kill launcher", (stage.other_rank(),), stage.step(), COMPUTING))
    stage.expect_code(-signal.SIGKILL)
    return Noticed("no process of the run is left", _gone_after(stage))


def kill_agent(stage: Stage) -> Noticed:
    """One of two, as on two machines. Without a scheduler nobody can give the run another machine: it ends."""
    stage.machines, last = 2, stage.run.ranks - 1
    stage.start(Strike("kill launcher", (last,), stage.step(), COMPUTING))
    stage.expect_code(-signal.SIGKILL, machine=1)
    stage.expect_code(EXIT_RESUMABLE)
    _gone_after(stage)
    return stage.expect_said(rf"lost {{host}} with ranks? .*{last}", DEATH_SECONDS)


def kill_lead(stage: Stage) -> Noticed:
    """The agent that decides for all."""
    stage.machines = 2
    stage.start(Strike("kill launcher", (0,), stage.step(), COMPUTING))
    stage.expect_code(-signal.SIGKILL)
    stage.expect_code(EXIT_FAILED, machine=1)
    _gone_after(stage)
    return stage.expect_said("lost the agent on .* that leads the run", DEATH_SECONDS, machine=1)


def crash_loop(stage: Stage) -> Noticed:
    """An error in the same step each time."""
    rank, step = stage.other_rank(), stage.step()
    stage.start(Strike("raise", (rank,), step, COMPUTING, repeats=True))
    stage.expect_code(EXIT_DO_NOT_REQUEUE)
    stage.expect_said(rf"error: \[rank {rank}\] RuntimeError: drilled.*{_at(step, COMPUTING)}")
    return stage.expect_said(r"3 restarts in a row saved no step")


def _gone_after(stage: Stage) -> float:
    """How long after the strike the last process was gone; not too long."""
    after = stage.seconds_since_struck(max(ended.gone_at_nanoseconds for ended in stage.ends))
    if after > 2 * DEATH_SECONDS:
        raise Unexpected(f"its processes were gone only after {after:.1f} s")
    return after


def _at(step: int, phase: str) -> str:
    return rf"\(on {{host}}, in step {step}: {phase}"
