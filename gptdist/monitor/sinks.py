"""Where logged values go, and the rule that none of it can stop training.

Knows which sinks a config asks for and what to do when one fails; each sink's format is in its own file. Only global
rank 0 builds sinks; the other ranks use `Sinks()`, which does nothing.
"""

import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from gptdist.config.sections import MonitorConfig
from gptdist.errors import ConfigError
from gptdist.monitor.console import ConsoleSink
from gptdist.monitor.jsonl import JsonlSink
from gptdist.monitor.progress import ProgressBar
from gptdist.monitor.tensorboard_sink import TensorBoardSink
from gptdist.monitor.wandb_sink import WandbSink

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIR = "tensorboard"


class Sink(Protocol):
    """A place for values and texts by step. Any method may raise; nothing may be opened before the first record."""

    name: str

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def text(self, step: int, tag: str, text: str) -> None: ...

    def close(self) -> None: ...


class Sinks:
    """Hands each record to every sink. One that raises is reported once, rested, tried again, and at last dropped."""

    def __init__(
        self,
        sinks: Sequence[Sink] = (),
        progress: ProgressBar | None = None,
        *,
        retry_seconds: float = 60.0,
        max_failures: int = 10,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sinks = [_Guarded(sink.name, sink, retry_seconds, max_failures, clock) for sink in sinks]
        self._progress = progress and _Guarded(progress.name, progress, retry_seconds, max_failures, clock)

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` of `step` everywhere. Never raises."""
        for sink in self._sinks:
            sink.call("log", step, values)

    def text(self, step: int, tag: str, text: str) -> None:
        """Record a text (generated samples, the config) everywhere. Never raises."""
        for sink in self._sinks:
            sink.call("text", step, tag, text)

    def advance(self, step: int, eta_seconds: float | None = None) -> None:
        """Move the progress bar, if there is one. Cheap enough for every step. Never raises."""
        if self._progress:
            self._progress.call("advance", step, eta_seconds)

    def close(self) -> None:
        """Write what is left and restore the terminal. Never raises."""
        if self._progress:
            self._progress.close()
        for sink in self._sinks:
            sink.close()


def check_sinks(monitor: MonitorConfig) -> None:
    """Raise ConfigError where a sink is asked for whose package is missing; for every rank, before the run starts."""
    wanted: list[tuple[str, str, str, str | bool | None]] = [
        ("tensorboard", "monitor.tensorboard", "false", monitor.tensorboard),
        ("wandb", "monitor.wandb_project", "null", monitor.wandb_project),
    ]
    for package, key, off, value in wanted:
        if value and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{key} ({value}) needs the package {package}, which is not installed. "
                f"Run `pip install {package}`, or set {key}={off}."
            )


def build_sinks(monitor: MonitorConfig, run_dir: Path, start_step: int, steps: int) -> Sinks:
    """The sinks of a run, for global rank 0. `start_step`: steps done (0: a fresh run); `steps`: of the whole run."""
    progress = ProgressBar(start_step, steps) if monitor.progress and sys.stdout.isatty() else None
    sinks: list[Sink] = [
        ConsoleSink(steps, progress.write_line if progress else None),
        JsonlSink(run_dir / METRICS_FILE),
    ]
    if monitor.tensorboard:
        sinks.append(TensorBoardSink(run_dir / TENSORBOARD_DIR, start_step))
    if monitor.wandb_project:
        sinks.append(WandbSink(monitor.wandb_project, run_dir, start_step))
    return Sinks(sinks, progress)


class _Guarded:
    """Calls one sink and keeps its failures to itself."""

    def __init__(
        self, name: str, sink: Any, retry_seconds: float, max_failures: int, clock: Callable[[], float]
    ) -> None:
        self._name = name
        self._sink = sink
        self._retry_seconds = retry_seconds
        self._max_failures = max_failures
        self._clock = clock
        self._failures = 0
        self._lost = 0
        self._retry_at = 0.0

    def call(self, method: str, *arguments: Any) -> None:
        if self._failures >= self._max_failures or (self._failures and self._clock() < self._retry_at):
            self._lost += 1
            return
        try:
            getattr(self._sink, method)(*arguments)
        except Exception as error:
            self._note_failure(error)
            return
        if self._failures:
            _warn(f"{self._name} works again; {self._lost} records are missing from it")
            self._failures = self._lost = 0

    def close(self) -> None:
        try:
            self._sink.close()
        except Exception as error:
            _warn(f"{self._name} did not close ({_reason(error)})")

    def _note_failure(self, error: Exception) -> None:
        self._failures += 1
        self._lost += 1
        self._retry_at = self._clock() + self._retry_seconds
        if self._failures >= self._max_failures:
            _warn(f"{self._name} failed {self._failures} times and is dropped ({_reason(error)})")
        elif self._failures == 1:
            _warn(f"{self._name} failed ({_reason(error)}); training goes on, retrying every {self._retry_seconds:g} s")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _warn(message: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # stderr is full or closed: there is nobody left to tell
        print(f"warning: monitor: {message}", file=sys.stderr, flush=True)
