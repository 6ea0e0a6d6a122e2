"""How a run on this machine ended, from how each of its ranks ended: one exit code and one message.

Pure: knows no process, pipe or clock. When one rank fails, the others usually follow with errors of broken collectives;
the verdict is about the rank that failed first by itself.
"""

import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from gptdist.errors import EXIT_DONE, EXIT_FAILED, EXIT_RESUMABLE

EXIT_INTERRUPTED = 128 + signal.SIGINT
_DEADLY = {signal.SIGKILL: "out of memory?", signal.SIGSEGV: "a crash in native code", signal.SIGBUS: "/dev/shm full?"}


@dataclass(frozen=True)
class Report:
    """What a rank said about the exception that ended it. `echo`: it only repeats another rank's trouble. `unfit`:
    hosts that cannot take part in the run."""

    kind: str
    message: str
    traceback: str
    exit_code: int
    deliberate: bool
    echo: bool
    at_nanoseconds: int
    unfit: tuple[str, ...] = ()

    @classmethod
    def read(cls, content: bytes | bytearray) -> "Report":
        """From the JSON that the rank wrote."""
        fields = json.loads(content)
        return cls(**{**fields, "unfit": tuple(fields["unfit"])})


@dataclass(frozen=True)
class RankEnd:
    """How one rank ended: by itself with `exit_code`, or by `signal_number`; seen by the launcher at
    `at_nanoseconds`. `premature`: in the middle of training, whatever its exit code says."""

    global_rank: int
    exit_code: int | None
    signal_number: int | None
    report: Report | None
    at_nanoseconds: int
    premature: bool = False

    @property
    def is_good(self) -> bool:
        return self.report is None and self.exit_code in (EXIT_DONE, EXIT_RESUMABLE) and not self.premature


@dataclass(frozen=True)
class Verdict:
    """`message` is empty where there is nothing to say. `global_rank`: the rank that failed first by itself, where that
    is known. `deliberate`: with an error that gptdist raised on purpose. `unfit`: hosts to do without."""

    exit_code: int
    message: str = ""
    traceback: str = ""
    global_rank: int | None = None
    deliberate: bool = False
    unfit: tuple[str, ...] = ()


def judge(ends: Sequence[RankEnd], world_size: int, stop_signal: int | None = None, debug: bool = False) -> Verdict:
    """The verdict on ranks that ended by themselves. `stop_signal`: what the launcher had passed on to them, if
    anything.

    `ends` may lack ranks that the launcher had to end. `debug`: give the traceback of deliberate errors too.
    """
    bad = [end for end in ends if not end.is_good]
    if stop_signal is not None and any(end.signal_number in (stop_signal, signal.SIGTERM) for end in bad):
        code = EXIT_INTERRUPTED if stop_signal == signal.SIGINT else EXIT_RESUMABLE
        return Verdict(code, "stopped before training could save; the newest checkpoint, if any, is as it was.")
    if not bad:
        return Verdict(EXIT_RESUMABLE if any(end.exit_code == EXIT_RESUMABLE for end in ends) else EXIT_DONE)
    first = min(bad, key=_precedence)
    if first.report is None:
        return Verdict(_exit_code(first), _silent_end(first), global_rank=first.global_rank)
    report = first.report
    same = sum(end.report is not None and end.report.message == report.message for end in bad)
    prefix = "" if same == world_size or report.echo else f"[rank {first.global_rank}] "
    culprit = None if report.echo else first.global_rank
    if report.deliberate:
        traceback = report.traceback if debug else ""
        return Verdict(report.exit_code, prefix + report.message, traceback, culprit, True, report.unfit)
    message = f"{prefix}{report.kind}: {report.message}" if report.message else f"{prefix}{report.kind}"
    return Verdict(report.exit_code, message, report.traceback, culprit)


def _precedence(end: RankEnd) -> tuple[int, int]:
    """Own errors and kills before aborts (NCCL and gloo abort on lost peers) before echoes; then by time."""
    if end.report is not None:
        return (2 if end.report.echo else 0), end.report.at_nanoseconds
    return (1 if end.signal_number in (signal.SIGABRT, signal.SIGTERM) else 0), end.at_nanoseconds


def _exit_code(end: RankEnd) -> int:
    return EXIT_FAILED if end.exit_code is None or end.premature else end.exit_code


def _silent_end(end: RankEnd) -> str:
    if end.signal_number is None:
        return f"rank {end.global_rank} ended with exit code {end.exit_code} without saying why; see its output above."
    try:
        name = signal.Signals(end.signal_number).name
    except ValueError:
        name = "unknown"
    why = _DEADLY.get(signal.Signals(end.signal_number), "") if name != "unknown" else ""
    return f"rank {end.global_rank} was killed by signal {end.signal_number} ({name}){': ' + why if why else ''}"
