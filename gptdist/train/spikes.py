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
EXTREME = 2.5
"""One step this many times `train.spike_factor` above the median is a spike by itself."""
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
        score, text = self._judge(loss, log_norm)
        if score < self._factor:
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
        if self._suspects < SUSTAINED and score < EXTREME * self._factor:
            return None
        self._told = True
        self.total += 1
        return self._spike(step, text)

    def _spike(self, step: int, text: str) -> Spike:
        wanted = self._since - self._lead - 1  # the step before the window
        before, samples = next((entry for entry in self._recent if entry[0] >= wanted), self._recent[0])
        in_a_row = f", the last of {self._suspects} suspect steps in a row" if self._suspects > 1 else ""
        return Spike(step, before + 1, samples, f"step {step}: {text}{in_a_row}")

    def _judge(self, loss: float, log_norm: float | None) -> tuple[float, str]:
        """The higher one of both scores, in robust deviations, and what to say of it."""
        if len(self._losses) < max(self._window // 2, 1):
            return 0.0, ""
        middle, deviation = _middle(self._losses)
        deviation = max(deviation, _LEAST_LOSS_DEVIATION * abs(middle))
        score = _score(loss - middle, deviation)
        text = f"loss {loss:.4f}, {score:.1f} robust deviations above {middle:.4f}, its median of {len(self._losses)}"
        if log_norm is None or not self._log_norms:
            return score, text
        middle, deviation = _middle(self._log_norms)
        norm_score = _score(log_norm - middle, max(deviation, _LEAST_NORM_DEVIATION))
        if norm_score <= score:
            return score, text
        return norm_score, (
            f"gradient norm {math.exp(log_norm):.4g}, {norm_score:.1f} robust deviations above {math.exp(middle):.4g}, "
            f"its median of {len(self._log_norms)}"
        )

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


def _middle(values: deque[float]) -> tuple[float, float]:
    """Median and robust deviation."""
    middle = median(values)
    return middle, _TO_DEVIATIONS * median(abs(value - middle) for value in values)


def _score(above: float, deviation: float) -> float:
    if above <= 0:
        return 0.0
    return above / deviation if deviation > 0 else math.inf
