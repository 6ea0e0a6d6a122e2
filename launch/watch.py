"""Watches the ranks of a local launch until all have ended: output, reports, signals, failures.

Knows processes and pipes; which of several failures counts is `verdict.py`'s to say.
"""

import json
import os
import selectors
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from gptdist.errors import EXIT_FAILED
from launch.relay import LineRelay
from launch.verdict import EXIT_INTERRUPTED, RankEnd, Report, Verdict, judge

SETTLE_SECONDS = 1.0
"""After a failure, how long the other ranks may go on: how they end tells which one failed first by itself."""
ECHO_SETTLE_SECONDS = 5.0
"""The same while all that is known are errors of lost peers: the lost one is still to show."""
GRACE_SECONDS = 2.0
"""Between TERM and KILL for ranks that outlive a failed one."""
POLL_SECONDS = 0.25


@dataclass
class RunningRank:
    """One rank as the launcher sees it."""

    global_rank: int
    pid: int
    report_fd: int
    relays: list[LineRelay]
    report: bytearray = field(default_factory=bytearray)
    end: RankEnd | None = None

    def send(self, number: int) -> None:
        """Signal it, unless it was reaped: then its pid may be someone else's."""
        if self.end is None:
            os.kill(self.pid, number)

    def reap(self, wait: bool = False) -> None:
        """Take note of its end, if it has ended."""
        if self.end is not None:
            return
        pid, status = os.waitpid(self.pid, 0 if wait else os.WNOHANG)
        if pid == 0:
            return
        self.read_report()
        code = os.waitstatus_to_exitcode(status)
        self.end = RankEnd(
            self.global_rank,
            exit_code=code if code >= 0 else None,
            signal_number=-code if code < 0 else None,
            report=Report(**json.loads(self.report)) if self.report.endswith(b"}") else None,
            at_nanoseconds=time.monotonic_ns(),
        )

    def read_report(self) -> bool:
        """Read what it has said; False at the end."""
        while True:
            try:
                data = os.read(self.report_fd, 1 << 16)
            except BlockingIOError:
                return True
            if not data:
                return False
            self.report += data


class Watch:
    """`wakeup_fd` becomes readable, and `pending` holds the number, when a signal arrives."""

    def __init__(
        self, ranks: Sequence[RunningRank], wakeup_fd: int, pending: list[int], timeout_seconds: float | None
    ) -> None:
        self._ranks = ranks
        self._wakeup_fd = wakeup_fd
        self._pending = pending
        self._deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        self._timeout_seconds = timeout_seconds
        self._stop_signal: int | None = None
        self._selector = selectors.DefaultSelector()
        self._selector.register(wakeup_fd, selectors.EVENT_READ)
        for rank in ranks:
            os.set_blocking(rank.report_fd, False)
            self._selector.register(rank.report_fd, selectors.EVENT_READ, rank.read_report)
            for relay in rank.relays:
                self._selector.register(relay.source_fd, selectors.EVENT_READ, relay.pump)

    def run(self) -> Verdict:
        """Until every rank has ended, by itself or, after a failure, by us."""
        verdict: Verdict | None = None
        failed_at: float | None = None
        while verdict is None and self._running():
            self._turn()
            verdict = self._cut_short()
            if any(rank.end is not None and not rank.end.is_good for rank in self._ranks):
                failed_at = failed_at or time.monotonic()
                if time.monotonic() > failed_at + self._settle_seconds():
                    break
        verdict = verdict or judge(self._ends(), len(self._ranks), self._stop_signal, "GPTDIST_DEBUG" in os.environ)
        self._end_all()
        return verdict

    def _running(self) -> bool:
        return any(rank.end is None for rank in self._ranks)

    def _ends(self) -> list[RankEnd]:
        return [rank.end for rank in self._ranks if rank.end is not None]

    def _settle_seconds(self) -> float:
        bad = [end for end in self._ends() if not end.is_good]
        return ECHO_SETTLE_SECONDS if all(end.report and end.report.echo for end in bad) else SETTLE_SECONDS

    def _turn(self) -> None:
        for key, _ in self._selector.select(POLL_SECONDS):
            if key.fileobj == self._wakeup_fd:
                os.read(self._wakeup_fd, 4096)
            elif not key.data():
                self._selector.unregister(key.fileobj)
        for rank in self._ranks:
            rank.reap()

    def _cut_short(self) -> Verdict | None:
        """Pass signals on; a verdict where the user or the clock has lost patience."""
        while self._pending:
            number = self._pending.pop(0)
            if number == signal.SIGINT and self._stop_signal == signal.SIGINT:
                self._send(signal.SIGKILL)
                return Verdict(EXIT_INTERRUPTED, "interrupted; the newest checkpoint, if any, is as it was.")
            if number == signal.SIGINT:
                print("stopping: the ranks save and exit; Ctrl-C again ends them at once", file=sys.stderr, flush=True)
            self._stop_signal = number
            self._send(signal.SIGTERM if number == signal.SIGINT else number)
        if self._deadline is not None and time.monotonic() > self._deadline:
            late = ", ".join(str(rank.global_rank) for rank in self._ranks if rank.end is None)
            return Verdict(EXIT_FAILED, f"rank {late} still ran after {self._timeout_seconds:g} s, the limit; ended.")
        return None

    def _send(self, number: int) -> None:
        for rank in self._ranks:
            rank.send(number)

    def _end_all(self) -> None:
        if self._running():
            self._send(signal.SIGTERM)
            patience = time.monotonic() + GRACE_SECONDS
            while self._running() and time.monotonic() < patience:
                self._turn()
        kill_ranks(self._ranks)
        for rank in self._ranks:
            for relay in rank.relays:
                relay.close()
            os.close(rank.report_fd)
        self._selector.close()


def kill_ranks(ranks: Sequence[RunningRank]) -> None:
    """End what still runs, and wait for it."""
    for rank in ranks:
        rank.send(signal.SIGKILL)
    for rank in ranks:
        rank.reap(wait=True)
