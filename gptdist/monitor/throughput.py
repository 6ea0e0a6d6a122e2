"""How fast a run is: tokens, model FLOPs, MFU, time left, memory.

Takes numbers and keeps a few; imports torch only to ask a GPU for its memory. What a model's FLOPs are is not known
here.
"""

import resource
import statistics
import sys
from collections import deque
from pathlib import Path

RECENT_STEPS = 50


class Throughput:
    """Sums up steps between two log lines. `peak_flops` is of one device; None leaves MFU out."""

    def __init__(self, flops_per_token: float, devices: int = 1, peak_flops: float | None = None) -> None:
        self._flops_per_token = flops_per_token
        self._total_peak = devices * peak_flops if peak_flops else None
        self._steps = 0
        self._tokens = 0
        self._seconds = 0.0
        self._wait_seconds = 0.0
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)

    def update(self, tokens: int, seconds: float, data_wait_seconds: float = 0.0) -> None:
        """Note one optimizer step: `tokens` over all ranks in `seconds`, waiting for data included."""
        self._steps += 1
        self._tokens += tokens
        self._seconds += seconds
        self._wait_seconds += data_wait_seconds
        self._recent.append(seconds / tokens)

    def eta_seconds(self, remaining_tokens: int) -> float | None:
        """Time for `remaining_tokens` at the recent pace; None before the first step.

        The median step counts, so that a slow first step or a pause does not; per token, so that a growing batch does
        not mislead. Evaluations and saves to come are not in it.
        """
        return remaining_tokens * statistics.median(self._recent) if self._recent else None

    def interval(self, remaining_tokens: int) -> dict[str, float]:
        """The values since the last call, by the names that `console.py` lists, and a new start. Empty without steps.

        `speed/step_seconds` and `speed/data_wait_seconds` are means over the steps.
        """
        if not self._steps or self._seconds <= 0:
            return {}
        tokens_per_second = self._tokens / self._seconds
        model_flops = tokens_per_second * self._flops_per_token
        values = {
            "speed/tokens_per_second": tokens_per_second,
            "speed/model_flops": model_flops,
            "speed/step_seconds": self._seconds / self._steps,
            "speed/data_wait_seconds": self._wait_seconds / self._steps,
        }
        if self._total_peak:
            values["speed/mfu"] = model_flops / self._total_peak
        eta = self.eta_seconds(remaining_tokens)
        if eta is not None:
            values["speed/eta_seconds"] = eta
        self._steps = self._tokens = 0
        self._seconds = self._wait_seconds = 0.0
        return values


def memory_bytes(device_type: str) -> int:
    """For `cuda`, the most memory torch had allocated on the current GPU so far; else resident memory."""
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    try:
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux: the peak, which macOS counts in bytes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return resident_pages * resource.getpagesize()
