"""When the ranks of an allocation are to be asked to save and end: as late as is safe before its time is over.

Pure: handed an environment, times and a clock; asks nobody. Slurm's warning signal, which comes at a fixed time, is
answered as well; this is for runs whose saves take longer than that, or that were not warned.
"""

import time
from collections.abc import Callable, Mapping

SAFETY = 2.0
"""A save, and a step, may take so many times as long as they did last."""
MARGIN_SECONDS = 30.0
"""For what comes after the save: ranks end, the record is written, the job is requeued. At most this part of it:"""
LARGEST_MARGIN = 0.1
END_VARIABLES = ("SLURM_JOB_END_TIME", "GPTDIST_JOB_ENDS")
"""Seconds since the epoch. Older versions of Slurm do not set the first; the run's batch script sets the second."""


def find_end(environment: Mapping[str, str]) -> float | None:
    """When the time of the allocation is over, seconds since the epoch; None where nobody says."""
    found = (environment.get(name, "") for name in END_VARIABLES)
    return next((float(value) for value in found if value.isdecimal()), None)


class TimeLimit:
    """Of one allocation, that ends at `end`, seconds since the epoch; None: it has no end.

    An end that has passed when the ranks only begin is a clock that is off, and is passed over.
    """

    def __init__(self, end: float | None, clock: Callable[[], float] = time.time) -> None:
        self._end = end if end is not None and end > clock() else None
        self._clock = clock
        self._margin_seconds = min(MARGIN_SECONDS, LARGEST_MARGIN * self.seconds_left)

    def is_near(self, save_seconds: float, step_seconds: float) -> bool:
        """Whether to save now. The step at hand has still to end; times as they were last, 0 where none is known."""
        return self.seconds_left < SAFETY * (save_seconds + step_seconds) + self._margin_seconds

    @property
    def seconds_left(self) -> float:
        """Infinite where there is no end."""
        return float("inf") if self._end is None else self._end - self._clock()


NO_TIME_LIMIT = TimeLimit(None)
