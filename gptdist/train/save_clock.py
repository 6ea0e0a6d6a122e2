"""When the clock says that it is time to save: after so many minutes, or after the time that loses least.

Pure arithmetic over times that it is given. Only one rank's clock counts; how the others hear of it is the loop's.
"""

import math
import time
from collections.abc import Callable

from gptdist.config.sections import CheckpointConfig

FIRST_SECONDS = 300.0
"""Before the first save with interval auto, while it is not known what one costs."""
LONGEST_SECONDS = 6 * 3600.0
"""However seldom machines fail, nobody wants to lose more than this."""


def best_interval(stall_seconds: float, mtbf_seconds: float, save_seconds: float = 0.0) -> float:
    """Seconds between saves that lose least: sqrt(2 C M), the first-order optimum.

    J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974; J. T. Daly, "A
    higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3), 2006. C: how long training
    stands still for a save; M: mean time between failures of the whole run. At least `save_seconds`, how long one takes
    from its beginning to its end, since the next one waits for it; at most LONGEST_SECONDS.
    """
    # Where C is not small against M the approximation does not hold; Daly's bound there is M itself.
    optimum = math.sqrt(2 * stall_seconds * mtbf_seconds) if stall_seconds < mtbf_seconds / 2 else mtbf_seconds
    return max(min(optimum, LONGEST_SECONDS), save_seconds)


class SaveClock:
    """Whether a save is due by the time that has passed since the last one began, or since the start."""

    def __init__(self, config: CheckpointConfig, nodes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._automatic = config.interval == "auto"
        self._mtbf_seconds = config.node_mtbf / nodes
        self._clock = clock
        self._last = clock()
        self._stall_seconds: float | None = None
        self._save_seconds = 0.0
        self._fixed = math.inf if config.interval_minutes is None else 60 * config.interval_minutes

    @property
    def interval_seconds(self) -> float:
        """The time between saves as it is now; infinite where the clock does not matter."""
        if not self._automatic:
            return self._fixed
        if self._stall_seconds is None:
            return FIRST_SECONDS
        return best_interval(self._stall_seconds, self._mtbf_seconds, self._save_seconds)

    def is_due(self) -> bool:
        return self._clock() - self._last >= self.interval_seconds

    def began(self) -> None:
        """A save begins now, whatever it was due to."""
        self._last = self._clock()

    def measured(self, stall_seconds: float, save_seconds: float) -> None:
        """What a save took: training stood still for `stall_seconds`, and it was finished after `save_seconds`.

        The mean of this and what was known, so that one odd save does not count for all.
        """
        known = self._stall_seconds
        self._stall_seconds = stall_seconds if known is None else (known + stall_seconds) / 2
        self._save_seconds = save_seconds if known is None else (self._save_seconds + save_seconds) / 2
