"""A progress bar with the time left, at the foot of a terminal; log lines print above it.

Only for terminals: elsewhere the console prints plain lines and no bar is built. Knows steps and seconds, no values.
"""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gptdist.monitor.console import render_duration

REDRAW_SECONDS = 0.2


class ProgressBar:
    """Appears at the first `advance` or line. No thread redraws it, so it costs training nothing between steps."""

    name = "progress bar"

    def __init__(self, start_step: int, steps: int, console: Console | None = None) -> None:
        # Prints from anywhere in this process go above the bar: rich redirects stdout and stderr while the bar is up.
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta {task.fields[eta]}"),
            console=console,
            auto_refresh=False,
            expand=True,
        )
        self._task = self._progress.add_task("training", total=steps, completed=start_step, eta="?")
        self._steps = steps
        self._drawn_at = 0.0
        self._running = False

    def advance(self, step: int, eta_seconds: float | None = None) -> None:
        """`step` steps are done; `eta_seconds` to go, where that is known anew."""
        self._start()
        if eta_seconds is not None:
            self._progress.update(self._task, eta=render_duration(eta_seconds))
        self._progress.update(self._task, completed=step)
        now = time.monotonic()
        if now - self._drawn_at >= REDRAW_SECONDS or step == self._steps:
            self._drawn_at = now
            self._progress.refresh()

    def write_line(self, line: str) -> None:
        """Print `line` above the bar, as it is: no markup, no wrapping by rich."""
        self._start()
        self._progress.console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the bar as it stands and give the terminal back."""
        if self._running:
            self._running = False
            self._progress.stop()

    def _start(self) -> None:
        if not self._running:
            self._running = True
            self._progress.start()
