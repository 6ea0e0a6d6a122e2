"""When ranks hang, and which of them is at fault: the patience learned from the run, and the odd one out.

Pure: knows what agents say of their ranks, no process, no clock. A rank in a collective waits for another, so what
counts is the patience with the one that it waits for.
"""

import statistics
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gptdist.monitor.heartbeat import StepTimes

SHORTEST_SECONDS = 60.0
"""A learned patience is never shorter."""
IN_A_STEP = frozenset({"forward and backward", "reducing gradients", "optimizer step", "logging"})
"""Phases that every step has, so that step times say how long they may take. Data may come from far away."""
TRAINING = IN_A_STEP | {"waiting for data"}
"""Phases of a step."""
WITH_FILES = frozenset({"loading", "saving"})
"""Phases in which a rank that reads or writes moves, and in which the others wait for the slowest in no collective that
could be seen: nobody hangs there while one of them moves."""
MIDWAY = TRAINING | {"evaluating", "sampling text", "saving"}
"""Phases of a run that has begun and is not over."""
LONGEST_SAVE_SECONDS = 3600.0
"""A rank whose file takes longer to write or read than this, or than launch.timeout where that is more, is given up."""
LONGEST_UPLOAD_SECONDS = 24 * 3600.0
"""The same to a URL, or from there."""

_STEPS_REMEMBERED = 64
_OF_MEDIAN = 10.0
_OF_LONGEST = 3.0


@dataclass(frozen=True)
class Standing:
    """Where a rank stands, as its agent sees it. `still_seconds`: since it last moved, in a phase with files also since
    it last read or wrote, of the time that the agent itself was awake; `stopped`: by a signal; `step`: the last one
    finished; `times`: of steps not yet told of."""

    global_rank: int
    stopped: bool
    step: int
    phase: str
    collective: str | None
    still_seconds: float
    saved_step: int | None = None
    times: tuple[StepTimes, ...] = ()
    save_seconds: float = 0.0  # what the last save took


class Patience:
    """How long a rank may stand still in each phase, learned from what was seen."""

    def __init__(
        self, hang_timeout: float | None, longest_wait: float, of_phases: Mapping[str, float] | None = None
    ) -> None:
        """`hang_timeout`: what the user set for training, None to learn it. Where nothing is known yet: `longest_wait`,
        and in phases where ranks wait longer for each other, `of_phases`. Seconds."""
        self._hang_timeout = hang_timeout
        self._longest_wait = longest_wait
        self._of_phases = of_phases or {}
        self._steps: deque[float] = deque(maxlen=_STEPS_REMEMBERED)
        self._longest_still: dict[str, float] = {}
        self._last: dict[int, Standing] = {}
        self._learned: float | None = None

    def learn(self, standing: Standing) -> None:
        """From one more look at a rank."""
        if standing.times:
            self._steps.extend(times.seconds for times in standing.times)
            self._learned = None
        last = self._last.get(standing.global_rank)
        if last is not None and standing.still_seconds < last.still_seconds:  # so it was not stuck there
            longest = self._longest_still.get(last.phase, 0.0)
            self._longest_still[last.phase] = max(longest, last.still_seconds)
        self._last[standing.global_rank] = standing

    def restart(self) -> None:
        """Forget where ranks stood: others take their places. What was learned stays."""
        self._last.clear()

    def seconds(self, standing: Standing) -> float:
        """How long this rank may stand still where it is."""
        if standing.phase in IN_A_STEP or standing.stopped or (self._hang_timeout and standing.phase in TRAINING):
            return self._in_a_step()
        seen = self._longest_still.get(standing.phase, 0.0)
        longest = max(self._longest_wait, self._of_phases.get(standing.phase, 0.0))
        return max(longest, self._in_a_step(), _OF_LONGEST * seen)

    def _in_a_step(self) -> float:
        if self._hang_timeout is not None:
            return self._hang_timeout
        if not self._steps:
            return max(SHORTEST_SECONDS, self._longest_wait)
        if self._learned is None:
            learned = max(_OF_MEDIAN * statistics.median(self._steps), _OF_LONGEST * max(self._steps))
            self._learned = max(SHORTEST_SECONDS, learned)
        return self._learned


@dataclass(frozen=True)
class Hang:
    """`culprits`: the ranks that are not where the others are; none where all are in the same place."""

    standings: tuple[Standing, ...]
    culprits: tuple[int, ...]
    patience_seconds: float


def find_hang(standings: Sequence[Standing], patience: Patience) -> Hang | None:
    """Whether these ranks, all that still run, wait in vain."""
    culprits = find_culprits(standings)
    suspects = [standing for standing in standings if standing.global_rank in culprits] or standings
    with_files = min((standing.still_seconds for standing in standings if _has_files(standing)), default=0.0)
    late = [
        standing
        for standing in suspects
        if (with_files if _has_files(standing) else standing.still_seconds) > patience.seconds(standing)
    ]
    if not late:
        return None
    return Hang(tuple(standings), culprits, max(patience.seconds(standing) for standing in late))


def find_culprits(standings: Sequence[Standing]) -> tuple[int, ...]:
    """Who the others wait for, if they wait: ranks stopped by a signal, else those in no collective while others are in
    one, else the minority, else those behind; none where all are in the same place."""
    stopped = _ranks(standing for standing in standings if standing.stopped)
    if stopped:
        return stopped
    free = _ranks(standing for standing in standings if standing.collective is None)
    if 0 < len(free) < len(standings):
        return free
    groups = Counter(_place(standing) for standing in standings)
    if len(groups) < 2:
        return ()
    place, count = groups.most_common(1)[0]
    if 2 * count > len(standings):
        return _ranks(standing for standing in standings if _place(standing) != place)
    behind = min(standing.step for standing in standings)
    last = _ranks(standing for standing in standings if standing.step == behind)
    return last if len(last) < len(standings) else ()


def _has_files(standing: Standing) -> bool:
    return standing.phase in WITH_FILES and not standing.stopped


def _place(standing: Standing) -> tuple[int, str, str | None]:
    return standing.step, standing.phase, standing.collective


def _ranks(standings: Iterable[Standing]) -> tuple[int, ...]:
    return tuple(sorted(standing.global_rank for standing in standings))
