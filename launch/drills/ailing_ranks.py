"""Faults of ranks that live on: they hang, are slow, miss a collective, compute nonsense, or have another time.

Each is a function that strikes a run and tells how it was noticed, or raises Unexpected.
"""

import re
from collections.abc import Callable

from gptdist.checkpoint.compare import compare
from gptdist.checkpoint.folder import parse_step, step_folders
from gptdist.checkpoint.read import Checkpoint
from gptdist.errors import EXIT_DONE
from launch.drills.rank_faults import Strike
from launch.drills.small_run import HANG_SECONDS, SAVE_INTERVAL, SmallRun
from launch.drills.stage import COMPUTING, DEATH_SECONDS, EARLIEST, Noticed, Stage, Unexpected

NAMED_WITHIN_STEPS = 20
HOUR = 3600.0
SAVE_PATIENCE_SECONDS = 10.0


def hangs(kind: str, said: str) -> Callable[[Stage], Noticed]:
    """A rank stands still; `said` of it in one sentence, above it all ranks and their stacks."""

    def happen(stage: Stage) -> Noticed:
        rank, step = stage.other_rank(), stage.step()
        stage.start(Strike(kind, (rank,), step, COMPUTING))
        stage.expect_code(EXIT_DONE)
        where = f"on {{host}}, in step {step}: {COMPUTING}"
        stage.expect_said(f"rank {rank} {where}.*<- not where the others are")
        stage.expect_said(f"stack of rank {rank}:")
        return stage.expect_said(rf"^rank {rank} {said} .*\({where}", HANG_SECONDS + DEATH_SECONDS)

    return happen


def hangs_in_save(stage: Stage) -> Noticed:
    """Where nothing is read or written any more, launch.timeout counts."""
    rank, step = stage.other_rank(), 3 * SAVE_INTERVAL + 1
    stage.set_up({"launch.timeout": f"{SAVE_PATIENCE_SECONDS:g}s"})
    stage.start(Strike("hang", (rank,), step, "saving"))
    stage.expect_code(EXIT_DONE)
    stage.expect_said(f"stack of rank {rank}:")
    within = SAVE_PATIENCE_SECONDS + DEATH_SECONDS
    return stage.expect_said(rf"^rank {rank} hangs .*\(on {{host}}, in step {step}: saving", within)


def skips_collective(stage: Stage) -> Noticed:
    """It goes on with gradients that were never reduced; what the others then wait for never comes, or does not fit."""
    rank, step = stage.other_rank(), stage.step()
    stage.start(Strike("skip collective", (rank,), step, "reducing gradients"))
    stage.expect_code(EXIT_DONE)
    return stage.expect_said(rf"rank {rank}\b.*\(on {{host}}, in step {step}: ", HANG_SECONDS + DEATH_SECONDS)


def slow(stage: Stage) -> Noticed:
    """For a while; the run goes on."""
    rank = stage.other_rank()
    stage.start(Strike("be slow", (rank,), EARLIEST, COMPUTING))
    stage.expect_code(EXIT_DONE)
    noticed = stage.expect_said(rf"rank {rank} is [\d.]+ times slower than its peers.*it is on {{host}}")
    named_in = re.search(r"steps \d+ to (\d+)", noticed.words)
    if named_in is None or int(named_in[1]) >= EARLIEST + NAMED_WITHIN_STEPS:
        raise Unexpected(f"it was not named within {NAMED_WITHIN_STEPS} steps after step {EARLIEST}: {noticed.words}")
    return noticed


def spoils_gradient(stage: Stage) -> Noticed:
    """The step is skipped by all ranks, and leaves every weight and moment as it was before."""
    step = stage.step()
    stage.set_up(stage.reference.run.settings)
    stage.start(Strike("spoil gradient", (stage.other_rank(),), step, "reducing gradients"))
    stage.expect_code(EXIT_DONE)
    noticed = stage.expect_said(r"skipped 1\b")
    with _saved(stage.run, step) as after, _saved(stage.reference.run, step - 1) as before:
        changed = compare(after, before).tensors
    if changed:
        raise Unexpected(f"the skipped step changed {len(changed)} tensors: {changed[0].name}")
    stage.prove(same_state=False)  # all later steps begin elsewhere
    return noticed


def clock_ahead(stage: Stage) -> Noticed:
    """One rank's clock is an hour ahead, from the start."""
    stage.start(Strike("shift clock", (stage.other_rank(),), 1, "starting", seconds=HOUR))
    stage.expect_code(EXIT_DONE)
    return Noticed("")


def clock_set_back(stage: Stage) -> Noticed:
    """Rank 0's clock is set back by an hour while it trains."""
    stage.start(Strike("shift clock", (0,), stage.step(), COMPUTING, seconds=-HOUR))
    stage.expect_code(EXIT_DONE)
    return Noticed("")


def _saved(run: SmallRun, step: int) -> Checkpoint:
    folders = {parse_step(path.name): path for path in step_folders(run.checkpoints_dir)}
    return Checkpoint.open(folders[step, 0], verify=True)
