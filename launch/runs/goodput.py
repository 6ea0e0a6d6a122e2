"""Goodput: the share of a run's time in which it made steps that were kept. Pure arithmetic over what was recorded.

The time counts from the first start to now, or to the end: waiting in a queue, starting, loading, saving, evaluating
and steps that a restart had to make again all count against it. The time between a wished end (the last step, a stop by
the user) and the next start does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from gptdist.errors import EXIT_DONE, EXIT_RESUMABLE
from launch.runs.attempts import Attempt
from launch.ranks.rules import DONE, STOP


@dataclass(frozen=True)
class LoggedStep:
    """A line of a run's log: at `time` (s since the epoch) step `step` was done; since the line before it, steps took
    `step_seconds` on average."""

    time: float
    step: int
    step_seconds: float


def goodput(log: Sequence[LoggedStep], attempts: Sequence[Attempt], now: float) -> float | None:
    """0 to 1; None before the first step. `now`: or when the run ended, if nobody recorded that it did."""
    if not log:
        return None
    wall = _wall_seconds(log, attempts, now)
    return min(1.0, kept_seconds(log, attempts) / wall) if wall > 0 else None


def last_kept_step(attempts: Sequence[Attempt]) -> int | None:
    """Of an attempt that has ended, what it finished or saved; of one that goes on, where it began: its log says more.
    None where there is no record."""
    if not attempts:
        return None
    last = attempts[-1]
    if last.ended is None:
        return last.start_step
    known = last.last_step if last.action == DONE else last.saved_step
    return max(known or 0, last.start_step)


def kept_steps(log: Sequence[LoggedStep], attempts: Sequence[Attempt]) -> list[LoggedStep]:
    """Lines of steps that count, by step: each attempt goes back to where it began, an ended one to what it saved."""
    kept: list[LoggedStep] = []
    cuts = [(attempt.began, attempt.start_step) for attempt in attempts]
    last, reached = attempts[-1] if attempts else None, last_kept_step(attempts)
    if last is not None and last.ended is not None and last.action != DONE and reached is not None:
        cuts.append((last.ended, reached))
    for line in log:
        while cuts and cuts[0][0] < line.time:
            _drop_after(kept, cuts.pop(0)[1])
        _drop_after(kept, line.step - 1)  # without records of attempts, a step that is there again shows a restart
        kept.append(line)
    for _, step in cuts:
        _drop_after(kept, step)
    return kept


def kept_seconds(log: Sequence[LoggedStep], attempts: Sequence[Attempt]) -> float:
    """Seconds of making those steps, and those kept after them. A step without a line of its own took as long as those
    of the next line, or, where there is none, of the one before."""
    seconds, before = 0.0, 0
    kept = kept_steps(log, attempts)
    for line in kept:
        seconds += (line.step - before) * line.step_seconds
        before = line.step
    unlogged = (last_kept_step(attempts) or 0) - before
    if unlogged > 0 and log:
        later = [line for line in log if line.step > before]  # dropped since, but as fast
        like = later[-1] if later else kept[-1]
        seconds += unlogged * like.step_seconds
    return seconds


def _drop_after(kept: list[LoggedStep], step: int) -> None:
    while kept and kept[-1].step > step:
        kept.pop()


def _wall_seconds(log: Sequence[LoggedStep], attempts: Sequence[Attempt], now: float) -> float:
    if not attempts:
        return now - (log[0].time - log[0].step_seconds)
    last = attempts[-1]
    end = last.ended if last.ended is not None and last.action in (STOP, DONE) else now
    pauses = sum(
        max(0.0, after.began - before.ended)
        for before, after in pairwise(attempts)
        if before.ended is not None and _was_wished(before)
    )
    return end - attempts[0].began - pauses


def _was_wished(attempt: Attempt) -> bool:
    return attempt.action == DONE or (attempt.action == STOP and attempt.exit_code in (EXIT_DONE, EXIT_RESUMABLE))
