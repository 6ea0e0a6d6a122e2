"""What comes after a failure: restart in place, requeue without the node at fault, or stop.

Pure: knows what was tried and what came of it, no process and no Slurm. Counts progress, never restarts alone: a run
that saves a step between two failures may fail for ever.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from gptdist.errors import EXIT_DO_NOT_REQUEUE, EXIT_FAILED, EXIT_RESUMABLE
from launch.runs.attempts import Attempt

RESTART = "restart in place"
REQUEUE = "requeue"
STOP = "stop"
DONE = "done"

RESTARTS_WITHOUT_PROGRESS = 3
"""So many in a row without a new saved step, and the run is given up."""
STOPS_WITHOUT_A_STEP = 10
"""So many allocations in a row that were over, by their time limit or for others, before a single step: the same."""


@dataclass(frozen=True)
class Failure:
    """How a set of ranks failed. `culprits`: hosts. `deliberate`: an error that gptdist raised on purpose, which would
    be raised again. `unfit`: the culprits cannot take part, whatever runs on them. `stopping`: a stop was asked for
    before."""

    reason: str
    exit_code: int = EXIT_FAILED
    culprits: tuple[str, ...] = ()
    node_lost: bool = False
    deliberate: bool = False
    stopping: bool = False
    unfit: bool = False


@dataclass(frozen=True)
class Decision:
    """`exit_code`: of the run, or of the attempt where another follows. `exclude`: hosts to do without from now on.
    `why`: a sentence where there is more to say than the failure."""

    action: str
    exit_code: int
    exclude: tuple[str, ...] = ()
    why: str = ""


def decide(attempts: Sequence[Attempt], failure: Failure, *, can_restart: bool, can_requeue: bool) -> Decision:
    """What comes after `failure` of the last of `attempts`, which are all that the run has had, oldest first.

    `can_restart`: the config allows restarts in place. `can_requeue`: a scheduler starts the run again where its exit
    code asks for that.
    """
    if failure.deliberate:
        return Decision(STOP, failure.exit_code)
    if failure.stopping and can_requeue and _stopped_in_vain(attempts):
        why = (
            f"{STOPS_WITHOUT_A_STEP} allocations in a row were over before a step was made; ask for a longer time, or "
            "let the run begin sooner, then run the same command again"
        )
        return Decision(STOP, EXIT_DO_NOT_REQUEUE, why=why)
    if failure.stopping:
        return Decision(REQUEUE, EXIT_RESUMABLE) if can_requeue else Decision(STOP, failure.exit_code)
    if restarts_without_progress(attempts) >= RESTARTS_WITHOUT_PROGRESS:
        return Decision(STOP, EXIT_DO_NOT_REQUEUE, why=_given_up(attempts))
    if failure.node_lost:
        return Decision(REQUEUE if can_requeue else STOP, EXIT_RESUMABLE, failure.culprits)
    if failure.unfit:
        return Decision(REQUEUE, EXIT_RESUMABLE, failure.culprits) if can_requeue else Decision(STOP, failure.exit_code)
    if not _ever_worked(attempts):
        return Decision(STOP, failure.exit_code)
    repeated = _repeated(attempts, failure)
    if repeated and can_requeue:
        why = f"{', '.join(repeated)} failed twice in this allocation; the run goes on without"
        return Decision(REQUEUE, EXIT_RESUMABLE, repeated, why)
    if can_restart:
        return Decision(RESTART, failure.exit_code)
    return Decision(STOP, failure.exit_code)


def restarts_without_progress(attempts: Sequence[Attempt]) -> int:
    """How many failed attempts at the end followed a failed one, with no new saved step in between. Counting begins
    anew where the run was started by hand; attempts that someone stopped are passed over."""
    count = newest = 0
    after_failure = False
    for attempt, later in zip_longest(attempts, attempts[1:]):
        # What an attempt saved is also told by where the next one began: it may have been killed without a word.
        newest = max(newest, attempt.start_step)
        reached = max(attempt.saved_step or 0, later.start_step if later else 0)
        failed = attempt.failed or attempt.ended is None
        if reached > newest:
            count = 0
        elif failed and after_failure:
            count += 1
        newest = max(newest, reached)
        after_failure = after_failure or failed
        if later is not None and attempt.action in (STOP, DONE):
            count, after_failure = 0, False
    return count


def _ever_worked(attempts: Sequence[Attempt]) -> bool:
    return any(_made_steps(attempt, later) for attempt, later in zip_longest(attempts, attempts[1:]))


def _made_steps(attempt: Attempt, later: Attempt | None) -> bool:
    """Whether it finished a step; of one that was killed without a word, its checkpoint or the next start tells."""
    reached = max(attempt.last_step or 0, attempt.saved_step or 0, later.start_step if later else 0)
    return reached > attempt.start_step


def _stopped_in_vain(attempts: Sequence[Attempt]) -> bool:
    """Whether the last ones were all ended by request, and made no step."""
    last = attempts[-STOPS_WITHOUT_A_STEP:]
    stopped = all(not attempt.failed and attempt.action in (REQUEUE, None) for attempt in last)
    return len(last) == STOPS_WITHOUT_A_STEP and stopped and not _ever_worked(last)


def _repeated(attempts: Sequence[Attempt], failure: Failure) -> tuple[str, ...]:
    """The culprits that were culprits before in the same allocation."""
    last = attempts[-1]
    before = {
        host
        for attempt in attempts[:-1]
        if (attempt.allocation, attempt.restart) == (last.allocation, last.restart)
        for host in attempt.culprits
    }
    return tuple(host for host in failure.culprits if host in before)


def _given_up(attempts: Sequence[Attempt]) -> str:
    saved = max((attempt.saved_step or attempt.start_step for attempt in attempts), default=0)
    return (
        f"{RESTARTS_WITHOUT_PROGRESS} restarts in a row saved no step after {saved}; mend what made them fail, then "
        "run the same command again"
    )
