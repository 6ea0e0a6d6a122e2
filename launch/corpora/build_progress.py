"""How far `gptdist data build` is: a display redrawn at the foot of a terminal, or plain lines now and then elsewhere.

Knows numbers and a stream, nothing of what the stages do. No thread draws, because the build forks its workers, and
nothing that happens to the stream is allowed to reach the build.
"""

import contextlib
import errno
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gptdist.monitor.console import render_count, render_duration

REDRAW_SECONDS = 0.2
LINE_SECONDS = 10.0


@dataclass
class Stage:
    """Where a stage is. `fresh_` counts leave out what an earlier run had done, and are what rates are made of."""

    name: str
    total: int
    unit: str
    workers: int
    began: float
    done: int = 0
    fresh_done: int = 0
    fresh: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)


class BuildProgress:
    """A `data_tools.reporting.progress.Progress`. `stream` may be closed, broken or None, as a detached stderr is."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        target = sys.stderr if stream is None else stream
        self._stream = _HarmlessStream(target)
        self._clock = clock
        self._stage: Stage | None = None
        self._dropped: Counter[str] = Counter()
        self._shown_at = clock()
        self._live: Live | None = None
        self._console: Console | None = None
        if self._stream.isatty() and os.environ.get("TERM", "dumb") != "dumb":
            # Not what FORCE_COLOR and the like would make of a stream: whether it is a terminal is known here.
            self._console = Console(file=self._stream, force_terminal=True)  # type: ignore[arg-type]

    def stage(self, name: str, total: int, unit: str, workers: int = 1) -> None:
        """Begin a stage of `total` times `unit`: "bytes", "documents", "tasks". The one before has ended."""
        self._end_stage()
        self._stage = Stage(name, total, unit, workers, began=self._clock())
        self._show(every_seconds=0.0 if self._console else LINE_SECONDS)

    def advance(
        self,
        done: int,
        documents: int = 0,
        text_bytes: int = 0,
        tokens: int = 0,
        dropped: Mapping[str, int] | None = None,
        resumed: bool = False,
    ) -> None:
        """`done` more units, and what was in them; `resumed` where an earlier run had done them.

        `advance(0)` only brings the display up to date.
        """
        self._dropped.update(dropped or {})
        if self._stage is None:
            return
        self._stage.dropped.update(dropped or {})
        self._stage.done += done
        if not resumed:
            self._stage.fresh_done += done
            self._stage.fresh.update(documents=documents, text_bytes=text_bytes, tokens=tokens)
        self._show(every_seconds=REDRAW_SECONDS if self._console else LINE_SECONDS)

    def note(self, text: str) -> None:
        """A line that stays, above the display."""
        self._write_line("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))

    def close(self) -> None:
        """Say how the last stage ended and give the terminal back."""
        self._end_stage()

    def __enter__(self) -> "BuildProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and self._stage is not None and self._stage.done < self._stage.total:
            self._write_line(f"{self._stage.name}  {render_position(self._stage)}  stopped")
            self._stage = None
        self._end_stage()

    def _end_stage(self) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()
        if self._stage is not None:
            ended, self._stage = self._stage, None
            self._shown_at = self._clock()
            self._write_line(render_stage_end(ended, self._shown_at - ended.began))

    def _show(self, every_seconds: float) -> None:
        now = self._clock()
        if self._stage is None or now - self._shown_at < every_seconds:
            return
        self._shown_at = now
        if self._console is None:
            self._write_line(render_line(self._stage, now - self._stage.began, self._dropped))
            return
        if self._live is None:
            # Streams are left alone: a forked worker would inherit redirected ones and draw displays of its own.
            self._live = Live(
                console=self._console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
            )
            self._live.start()
            self._console.show_cursor(True)  # nothing would bring it back after a kill
        self._live.update(_render_display(self._stage, now - self._stage.began, self._dropped), refresh=True)

    def _write_line(self, line: str) -> None:
        if self._console is not None:
            self._console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)
        else:
            self._stream.write(line + "\n")
            self._stream.flush()


def render_position(stage: Stage) -> str:
    """`41 %  1.23 GB of 3.00 GB`."""
    percent = min(100, 100 * stage.done // stage.total) if stage.total else 100
    done = render_decimal_bytes(stage.done) if stage.unit == "bytes" else f"{stage.done:,}"
    return f"{percent} %  {done} of {_amount(stage.total, stage.unit)}"


def render_rates(stage: Stage, seconds: float) -> str:
    """`1.20k documents/s  35.1 MB/s  8.10M tokens/s`: of what the stage counts, over the stage so far."""
    if seconds <= 0:
        return ""
    text_bytes = stage.fresh["text_bytes"] or (stage.fresh_done if stage.unit == "bytes" else 0)
    rates = [
        f"{render_count(count / seconds)} {what}/s" if what != "bytes" else f"{render_decimal_bytes(count / seconds)}/s"
        for count, what in (
            (stage.fresh["documents"], "documents"),
            (text_bytes, "bytes"),
            (stage.fresh["tokens"], "tokens"),
        )
        if count
    ]
    if not rates and stage.fresh_done:
        return f"{render_count(stage.fresh_done / seconds)} {stage.unit}/s"
    return "  ".join(rates)


def render_eta(stage: Stage, seconds: float) -> str:
    """`eta 2m10s`, at the stage's own rate; `eta ?` before there is one."""
    left = stage.total - stage.done
    if left <= 0:
        return "eta 0s"
    return f"eta {render_duration(left * seconds / stage.fresh_done)}" if stage.fresh_done > 0 else "eta ?"


def render_dropped(dropped: Mapping[str, int]) -> str:
    """`dropped 1,234: exact duplicate 1,000, too short 234`, the most frequent first; nothing for nothing."""
    reasons = sorted(((count, reason) for reason, count in dropped.items() if count), key=lambda one: (-one[0], one[1]))
    if not reasons:
        return ""
    return f"dropped {sum(dropped.values()):,}: " + ", ".join(f"{reason} {count:,}" for count, reason in reasons)


def render_line(stage: Stage, seconds: float, dropped: Mapping[str, int]) -> str:
    """A stage under way, for a log."""
    return _joined(
        stage.name,
        render_position(stage),
        render_rates(stage, seconds),
        render_eta(stage, seconds),
        _workers(stage),
        render_dropped(dropped),
    )


def render_stage_end(stage: Stage, seconds: float) -> str:
    """`tokenize  3.00 GB in 1m25s (1.00 GB of it done before)  35.1 MB/s`."""
    before = stage.done - stage.fresh_done
    resumed = f" ({_amount(before, stage.unit)} of it done before)" if before else ""
    took = f"{_amount(stage.done, stage.unit)} in {render_duration(seconds)}{resumed}"
    return _joined(
        stage.name, took, render_rates(stage, seconds) if seconds >= 1 else "", render_dropped(stage.dropped)
    )


def render_decimal_bytes(value: float) -> str:
    """As rates of bytes are said, in powers of 1000: `35.1 MB`."""
    count = render_count(value)
    prefix = count[-1] if count[-1].isalpha() else ""
    return f"{count.removesuffix(prefix)} {prefix}B"


def _render_display(stage: Stage, seconds: float, dropped: Mapping[str, int]) -> RenderableType:
    head = Table.grid(padding=(0, 2), expand=True)
    head.add_column(no_wrap=True)
    head.add_column(ratio=1)
    head.add_column(no_wrap=True, justify="right")
    bar = ProgressBar(total=max(1, stage.total), completed=stage.done if stage.total else 1)
    head.add_row(Text(stage.name), bar, Text(f"{render_position(stage)}  {render_eta(stage, seconds)}"))
    rows = [_joined(render_rates(stage, seconds) or "starting", _workers(stage)), render_dropped(dropped)]
    return Group(head, *(Text(row, style="dim", no_wrap=True, overflow="ellipsis") for row in rows if row))


def _amount(count: int, unit: str) -> str:
    return render_decimal_bytes(count) if unit == "bytes" else f"{count:,} {unit}"


def _workers(stage: Stage) -> str:
    return f"{stage.workers:,} workers" if stage.workers > 1 else ""


def _joined(*parts: str) -> str:
    return "  ".join(part for part in parts if part)


class _HarmlessStream:
    """A text stream whose troubles stay with it: what cannot be written is not written."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.encoding: str = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write what can be written."""
        self._try(lambda stream: stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, if it can be."""
        self._try(lambda stream: stream.flush())

    def isatty(self) -> bool:
        """False for a stream that cannot say."""
        try:
            return self._stream is not None and self._stream.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        """The stream's own; raises OSError where it has none, as streams do."""
        if self._stream is None:
            raise OSError(errno.EBADF, "no stream")
        return self._stream.fileno()

    def _try(self, do: Callable[[TextIO], object]) -> None:
        if self._stream is None:
            return
        try:
            do(self._stream)
        except UnicodeError:
            return
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):
                self._leave()
        except ValueError:  # closed
            self._stream = None

    def _leave(self) -> None:
        """Nobody reads any more. What is still buffered would fail again at exit and change the exit code."""
        with contextlib.suppress(OSError, ValueError):
            if self._stream is not None:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
        self._stream = None
