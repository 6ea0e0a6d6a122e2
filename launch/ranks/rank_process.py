"""One rank as its agent sees it: a forked process with a report, output, a pulse, and stacks to ask for.

Knows processes and pipes. How the ranks of a run stand to each other, and what follows from an end, is the lead's.
"""

import os
import selectors
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from gptdist.monitor.heartbeat import Beat, Pulse, StepTimes, create_memory
from gptdist.world import World
from launch.ranks.forked_rank import RankFiles, Target, run_as_rank
from launch.ranks.hang import MIDWAY, WITH_FILES, Standing
from launch.ranks.process_io import bytes_moved
from launch.ranks.relay import LineRelay
from launch.ranks.stacks import create_pad
from launch.ranks.verdict import RankEnd, Report

_WORTH_MENTIONING = 1 << 16
"""A rank that only waits wakes its own threads up with a few bytes now and then."""


@dataclass
class RankProcess:
    """One rank. `pad` is where it writes its stacks when asked."""

    global_rank: int
    pid: int
    report_fd: int
    pad: int
    relays: list[LineRelay]
    pulse: Pulse
    end: RankEnd | None = None
    _report: bytearray = field(default_factory=bytearray)
    _stopped: bool = False
    _moved: tuple[int, int, bool, int] = (0, 0, False, 0)
    _bytes_moved: int = 0
    _still_seconds: float = 0.0
    _told: StepTimes | None = None

    def send(self, number: int) -> None:
        """Signal it, unless it was reaped: then its pid may be someone else's."""
        if self.end is None:
            os.kill(self.pid, number)

    def reap(self) -> bool:
        """Take note of its stop or its end; whether it has ended just now."""
        while self.end is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            if pid == 0:
                return False
            if os.WIFSTOPPED(status) or os.WIFCONTINUED(status):
                self._stopped = os.WIFSTOPPED(status)
            else:
                self.end = self._ended(os.waitstatus_to_exitcode(status))
                return True
        return False

    def look(self, awake_seconds: float) -> Standing:
        """Where it stands. `awake_seconds`: of the time since the last look, how long the agent itself was awake; what
        stops a whole machine, or a job with its agents, hangs nobody."""
        beat = self.pulse.read()
        if beat.phase in WITH_FILES:
            self._look_at_files()
        moved = (beat.step, beat.beat_ns, self._stopped, self._bytes_moved)
        self._still_seconds = self._still_seconds + awake_seconds if moved == self._moved else 0.0
        self._moved = moved
        return Standing(
            self.global_rank,
            self._stopped,
            beat.step,
            (self.end and beat.ended_in) or beat.phase,  # of one that failed: where, and not that it then wound up
            beat.collective,
            self._still_seconds,
            beat.saved_step,
            self._new_times(beat),
            beat.save_seconds,
        )

    def watch(self, selector: selectors.BaseSelector) -> None:
        """Have what it says read whenever it says something. What is registered is to be called; False: no more."""
        os.set_blocking(self.report_fd, False)
        selector.register(self.report_fd, selectors.EVENT_READ, self._read_report)
        for relay in self.relays:
            selector.register(relay.source_fd, selectors.EVENT_READ, relay.pump)

    def close(self, selector: selectors.BaseSelector) -> None:
        """Copy the last of its output, and let go of what it had. It must have ended."""
        for fd in (self.report_fd, *(relay.source_fd for relay in self.relays)):
            with suppress(KeyError):
                selector.unregister(fd)
        for relay in self.relays:
            relay.close()
        self.pulse.close()
        os.close(self.report_fd)
        os.close(self.pad)

    def _look_at_files(self) -> None:
        found = bytes_moved(self.pid)
        if found is not None and found - self._bytes_moved >= _WORTH_MENTIONING:
            self._bytes_moved = found

    def _ended(self, code: int) -> RankEnd:
        self._read_report()
        end = RankEnd(
            self.global_rank,
            exit_code=code if code >= 0 else None,
            signal_number=-code if code < 0 else None,
            report=Report.read(self._report) if self._report.endswith(b"}") else None,
            at_nanoseconds=time.monotonic_ns(),
        )
        # One that leaves in the middle has left the others alone, whatever its exit code says.
        return replace(end, premature=end.is_good and self.pulse.read().phase in MIDWAY)

    def _read_report(self) -> bool:
        """Read what it has said; False at the end."""
        while True:
            try:
                data = os.read(self.report_fd, 1 << 16)
            except BlockingIOError:
                return True
            if not data:
                return False
            self._report += data

    def _new_times(self, beat: Beat) -> tuple[StepTimes, ...]:
        """Of the steps finished since the last look."""
        recent = beat.recent
        new = recent[recent.index(self._told) + 1 :] if self._told in recent else recent
        self._told = recent[-1] if recent else self._told
        return new


def fork_rank(
    world: World, target: str | Target, payload: Any, threads: int | None, foreign_fds: Sequence[int]
) -> RankProcess:
    """A child process that runs `target(world, payload)` as the rank at `world`. `foreign_fds`: the agent's, which it
    lets go of first.

    Rank 0 keeps the agent's stdout and stderr, so that a progress bar finds its terminal; others get pipes.
    """
    report_read, report_write = os.pipe()
    pipes = [] if world.is_first else [os.pipe(), os.pipe()]
    memory, pad = create_memory(), create_pad()
    pulse = Pulse(memory)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    agent_pid = os.getpid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12+ warns of threads; none of them holds a lock of ours
        pid = os.fork()
    if pid == 0:
        _shed([*foreign_fds, report_read, *(read for read, _ in pipes)])
        files = RankFiles(report_write, pad, (pipes[0][1], pipes[1][1]) if pipes else None)
        run_as_rank(target, payload, replace(world, heartbeat_fd=memory), agent_pid, files, threads)
    for fd in (report_write, memory, *(write for _, write in pipes)):
        os.close(fd)
    tag = f"[rank {world.global_rank}] "
    relays = [LineRelay(read, number, tag) for number, (read, _) in enumerate(pipes, start=1)]
    return RankProcess(world.global_rank, pid, report_read, pad, relays, pulse)


def _shed(fds: Sequence[int]) -> None:
    """Close them, and keep their numbers: an object of the agent's that is collected here closes a number once more."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in fds:
        os.dup2(nothing, fd)
    os.close(nothing)
