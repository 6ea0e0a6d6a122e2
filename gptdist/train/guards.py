"""What ends a run early: a signal, a `STOP` file, too many non-finite steps in a row.

Each guard only notices and says so. Whether all ranks stop, and at which step, is agreed in the loop; nothing here
talks to other ranks, saves or exits.
"""

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from gptdist.errors import TrainingDiverged

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
STOP_FILE = "STOP"


class StopSignals:
    """While entered, TERM, USR1 and USR2 set `requested` to the signal's name and do nothing else.

    Schedulers send one of these some time before they kill. The handler must not do more: it may run in the middle of
    anything. Enter in the main thread; the handlers of before come back on exit.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._notice)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None: the handler was not installed from Python and cannot be put back from it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _notice(self, number: int, frame: FrameType | None) -> None:
        # The first one is the reason; a second does not change it.
        if self.requested is None:
            self.requested = signal.Signals(number).name


def find_stop_file(run_dir: Path) -> Path | None:
    """The `STOP` file of a run, if someone made one. A folder that cannot be read counts as no."""
    path = run_dir / STOP_FILE
    return path if os.path.lexists(path) else None


def take_stop_file(run_dir: Path) -> str:
    """Remove the `STOP` file once the stop is decided, so that the next start of the run is not stopped by it again.

    For one rank only. Returns what to tell the user; a file that cannot be removed is not an error, since the run is
    stopping anyway.
    """
    path = run_dir / STOP_FILE
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        return f"stop file {path} (could not be removed: {error.strerror}; remove it before the next start)"
    return f"stop file {path} (now removed)"


@dataclass
class SkipCounter:
    """Counts steps skipped for a non-finite loss or gradient. `in_a_row` and `total` belong in a checkpoint."""

    limit: int
    in_a_row: int = 0
    total: int = 0

    def update(self, skipped: bool, step: int, culprits: Sequence[int] = ()) -> None:
        """Note whether `step` was skipped, and whose numbers were not finite, where that is known. Raises
        TrainingDiverged at the `limit`-th in a row, on every rank alike."""
        if not skipped:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.total += 1
        if self.in_a_row >= self.limit:
            raise TrainingDiverged(
                f"the loss or a gradient was not finite{on_ranks(culprits)} in {self.in_a_row} steps in a row, "
                f"up to step {step} "
                f"({self.total} skipped in all); train.max_skipped_steps allows fewer than {self.limit}. Resume from "
                "an earlier checkpoint with a lower optimizer.learning_rate or a longer schedule.warmup_steps; with "
                "train.precision fp16, start at a lower train.loss_scale or use bf16."
            )


def on_ranks(culprits: Sequence[int]) -> str:
    """` on rank 3`, ` on ranks 2, 3`, or nothing."""
    return f" on rank{'s' if len(culprits) > 1 else ''} {', '.join(map(str, culprits))}" if culprits else ""
