"""Loss spikes: steps whose loss or gradient norm is far above what it was, by the run's own noise.

Pure: numbers in, a verdict out; no torch, no file, no other rank. What is done about a spike is in `rollback.py` and in
the loop. Non-finite steps are `guards.SkipCounter`'s.

Each value is compared with the trailing window's median, in robust deviations: 1.4826 x the median absolute deviation,
which is the standard deviation of a normal distribution (Hampel 1974, "The influence curve and its role in robust
estimation"). Half of a window may be wild before either moves. Gradient norms are compared by their logarithm, since
their noise is a factor. Nothing depends on the unit of either.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from gptdist.config.sections import TrainConfig

SUSTAINED = 4
"""So many suspect steps in a row are a spike; one alone may be an odd batch."""
EXTREME = 2.0
"""A loss this many times `train.spike_factor` above its median is a spike by itself. A gradient norm is not: in sound
runs single ones stand out by 20 deviations, and once clipped they do nothing."""
_TO_DEVIATIONS = 1.4826
# However quiet a run is, less than so much of its loss, or of a factor of its gradient norm, is not noise to speak of.
_LEAST_LOSS_DEVIATION = 0.005
_LEAST_NORM_DEVIATION = 0.05


@dataclass(frozen=True)
class Spike:
    """A spike that was certain at `step`. The window that is suspect begins with step `first_step`, before which the
    run had trained on `first_sample` samples."""

    step: int
    first_step: int
    first_sample: int
    text: str


class SpikeWatch:
    """Judges one step after the other. `state()`, given to the next one, makes a resumed run judge as one that was
    never stopped."""

    def __init__(self, train: TrainConfig, step: int, samples: int, state: Mapping[str, Any] | None = None) -> None:
        """`step` and `samples`: where the run stands. `state`: of a watch there; none: nothing is known yet."""
        state = state or {}
        self.total = int(state.get("total", 0))  # spikes so far
        self._factor, self._window, self._lead = train.spike_factor, train.spike_window, train.spike_lead
        self._losses = deque[float](state.get("losses", ()), maxlen=self._window)
        self._log_norms = deque[float](state.get("log_norms", ()), maxlen=self._window)
        self._level = state.get("level")
        self._suspects = int(state.get("suspects", 0))  # in a row
        self._since = int(state.get("since", 0))  # step of the first of them
        self._told = bool(state.get("told", False))
        # (step, samples consumed after it), as far back as a suspect window can begin.
        recent = [(int(at), int(consumed)) for at, consumed in state.get("recent", ((step, samples),))]
        self._recent = deque(recent, maxlen=steps_to_look_back(train) + 1)

    def state(self) -> dict[str, Any]:
        """What the next watch must know: JSON."""
        return {
            "total": self.total,
            "losses": list(self._losses),
            "log_norms": list(self._log_norms),
            "level": self._level,
            "suspects": self._suspects,
            "since": self._since,
            "told": self._told,
            "recent": [list(entry) for entry in self._recent],
        }

    def update(
        self, step: int, samples: int, loss: float, grad_norm: float, *, skipped: bool = False, level: int = 0
    ) -> Spike | None:
        """Judge `step`, after which `samples` samples were consumed. A spike is told once, however long it lasts.

        `skipped`: nothing in it counts. `level`: where it changes, another loss is to be expected (another blend), and
        what is usual is learned anew.
        """
        self._recent.append((step, samples))
        if level != self._level:
            self._level = level
            self._forget()
        if skipped or not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return None
        log_norm = math.log(grad_norm) if grad_norm > 0 else None
        of_loss, of_norm = self._scores(loss, log_norm)
        if max(of_loss, of_norm) < self._factor:
            self._suspects, self._told = 0, False
            self._learn(loss, log_norm)
            return None
        if not self._suspects:
            self._since = step
        self._suspects += 1
        if self._told:
            if self._suspects > self._window:
                self._forget()  # it has stayed there: that is how things are now
            return None
        if self._suspects < SUSTAINED and of_loss < EXTREME * self._factor:
            return None
        self._told = True
        self.total += 1
        wanted = self._since - self._lead - 1  # the step before the window
        before, consumed = next(entry for entry in self._recent if entry[0] >= wanted)
        in_a_row = f"; suspect since step {self._since}" if self._since < step else ""
        text = (
            f"step {step}: loss {loss:.4f}, {of_loss:.1f} robust deviations above its median {median(self._losses):.4f}"
        )
        text += f"; gradient norm {grad_norm:.3g}, {of_norm:.1f} above its own{in_a_row}"
        return Spike(step, before + 1, consumed, text)

    def _scores(self, loss: float, log_norm: float | None) -> tuple[float, float]:
        """How far loss and gradient norm are above their medians, in robust deviations; 0 where that is not known."""
        if len(self._losses) < max(self._window // 2, 1):
            return 0.0, 0.0
        of_loss = _score(loss, self._losses, _LEAST_LOSS_DEVIATION * abs(median(self._losses)))
        if log_norm is None or not self._log_norms:
            return of_loss, 0.0
        return of_loss, _score(log_norm, self._log_norms, _LEAST_NORM_DEVIATION)

    def _learn(self, loss: float, log_norm: float | None) -> None:
        self._losses.append(loss)
        if log_norm is not None:
            self._log_norms.append(log_norm)

    def _forget(self) -> None:
        self._losses.clear()
        self._log_norms.clear()
        self._suspects, self._told = 0, False


def steps_to_look_back(train: TrainConfig) -> int:
    """A window that is found suspect begins at most so many steps before the one after which it is found."""
    return SUSTAINED + train.spike_lead


def _score(value: float, usual: deque[float], least_deviation: float) -> float:
    middle = median(usual)
    deviation = max(_TO_DEVIATIONS * median(abs(other - middle) for other in usual), least_deviation)
    if value <= middle:
        return 0.0
    return (value - middle) / deviation if deviation > 0 else math.inf
