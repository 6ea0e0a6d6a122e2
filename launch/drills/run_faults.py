"""All that `gptdist drill` puts a run through on one machine, by name; `docs/drills.md` says what must come of each.

Knows which faults there are, and how each gets its stage; what they do is in the files beside this one.
"""

import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptdist.errors import EXIT_DONE, EXIT_FAILED, GptdistError
from launch.drills.ailing_ranks import (
    clock_ahead,
    clock_set_back,
    hangs,
    hangs_in_save,
    skips_collective,
    slow,
    spoils_gradient,
)
from launch.drills.certificate import Finding
from launch.drills.dying_ranks import (
    KILLED,
    crash_loop,
    dies,
    kill_again,
    kill_agent,
    kill_all,
    kill_at_start,
    kill_in_save,
    kill_launcher,
    kill_lead,
    kill_rank_0,
)
from launch.drills.same_run import Reference
from launch.drills.small_disk import small_disk_problem
from launch.drills.small_run import SmallRun, build_small_corpus
from launch.drills.stage import LIMIT_SECONDS, Noticed, Stage
from launch.drills.surroundings import (
    asked_again_in_save,
    asked_to_stop,
    leftovers,
    no_room_for_a_while,
    no_room_for_checkpoints,
    no_room_for_logs,
    port_in_use,
    shard_goes_bad,
)

STEPS = 36


@dataclass(frozen=True)
class RunFault:
    """`title`: in the certificate. `impossible`: why it cannot be drilled here, None where it can."""

    title: str
    happen: Callable[[Stage], Noticed]
    impossible: Callable[[], str | None] = lambda: None


FAULTS: dict[str, RunFault] = {
    "kill-rank": RunFault("kill -9 of a rank", dies("kill", KILLED)),
    "kill-rank-0": RunFault("kill -9 of rank 0", kill_rank_0),
    "kill-all-ranks": RunFault("kill -9 of all ranks", kill_all),
    "kill-launcher": RunFault("kill -9 of the launcher, which watches its ranks", kill_launcher),
    "kill-agent": RunFault("kill -9 of the agent of a second machine", kill_agent),
    "kill-lead": RunFault("kill -9 of the agent that leads two machines", kill_lead),
    "kill-in-save": RunFault("kill -9 of a rank while all save", kill_in_save),
    "kill-at-start": RunFault("kill -9 of a rank before its first step", kill_at_start),
    "kill-again": RunFault("kill -9 of a rank, and of another while ranks start again", kill_again),
    "segfault": RunFault("a rank that crashes in native code", dies("segfault", "rank {rank} was killed by signal 11")),
    "exit-0": RunFault("os._exit(0) of a rank in mid-run", dies("leave", "rank {rank} ended with exit code 0")),
    "exception": RunFault("an exception on one rank", dies("raise", r"\[rank {rank}\] RuntimeError: drilled")),
    "crash-loop": RunFault("an exception in the same step each time", crash_loop),
    "stop-rank": RunFault("SIGSTOP of a rank", hangs("stop", "is stopped")),
    "hang": RunFault("a rank that waits for ever", hangs("hang", "hangs")),
    "hang-in-save": RunFault("a rank that waits for ever while all save", hangs_in_save),
    "skip-collective": RunFault("a rank that skips a collective", skips_collective),
    "slow-rank": RunFault("a rank five times slower", slow),
    "nan": RunFault("NaN in one rank's gradients", spoils_gradient),
    "clock-ahead": RunFault("a rank whose clock is an hour ahead", clock_ahead),
    "clock-set-back": RunFault("rank 0's clock set back by an hour in mid-run", clock_set_back),
    "term": RunFault("TERM", asked_to_stop("ask to stop", "SIGTERM")),
    "usr1": RunFault("USR1", asked_to_stop("ask by USR1", "SIGUSR1")),
    "term-in-save": RunFault("a second TERM during the save", asked_again_in_save),
    "full-checkpoints": RunFault("no room for checkpoints", no_room_for_checkpoints, small_disk_problem),
    "full-for-a-while": RunFault("no room for checkpoints for a while", no_room_for_a_while, small_disk_problem),
    "full-logs": RunFault("no room for logs and metrics", no_room_for_logs, small_disk_problem),
    "port-in-use": RunFault("a port in use", port_in_use),
    "leftovers": RunFault("a stale lock, torn records and half a checkpoint of an earlier run", leftovers),
    "bad-shard": RunFault("a shard that goes bad in mid-run", shard_goes_bad),
}


class DrillFailed(GptdistError):
    """There is nothing to compare faults with."""

    exit_code = EXIT_FAILED


EVERY_STEP_SAVED = {"checkpoint.interval": 1, "checkpoint.keep": STEPS}


def build_reference(
    work_dir: Path, ranks: int, steps: int = STEPS, settings: Mapping[str, Any] = EVERY_STEP_SAVED
) -> Reference:
    """A corpus, and the untouched run. Raises DrillFailed where even that does not work."""
    corpus = work_dir / "corpus"
    build_small_corpus(corpus)
    run = SmallRun(work_dir / "untouched", corpus, ranks, steps, settings)
    run.prepare()
    ended = run.start().wait(LIMIT_SECONDS)
    if ended.code != EXIT_DONE:
        raise DrillFailed(f"the untouched run ended with {ended.code}:\n{ended.end()}")
    reference = Reference(run)
    problem = reference.problem(run)
    if problem:
        raise DrillFailed(f"the untouched run is not what it should be: {problem}")
    return reference


def drill_faults(names: Sequence[str], reference: Reference, seed: int, work_dir: Path) -> Iterator[Finding]:
    """One after the other."""
    for name in names:
        fault = FAULTS[name]
        impossible = fault.impossible()
        if impossible:
            yield Finding(fault.title, skipped=impossible)
            continue
        with tempfile.TemporaryDirectory(dir=work_dir) as folder:
            stage = Stage(Path(folder) / name, reference, random.Random(f"{seed}/{name}"))
            yield stage.finding(fault.title, fault.happen)
