"""One fault's stage: a run of its own, its ranks struck, what is expected of it, and the proof in the end.

Knows how a command should end and what it should say; which faults there are is `run_faults.py`'s.
"""

import random
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptdist.errors import EXIT_DONE, GptdistError
from launch.drills.certificate import Finding
from launch.drills.rank_faults import Strike, read_struck, write_plan
from launch.drills.same_run import Reference, steps_lost
from launch.drills.small_run import Ended, SmallRun

COMPUTING = "forward and backward"
LIMIT_SECONDS = 240.0
"""A command that takes longer hangs."""
DEATH_SECONDS = 5.0
"""Within which a death must be noticed."""
EARLIEST, LATEST = 10, 14
"""Steps that faults strike in."""


class Unexpected(Exception):
    """What came of a fault is not what must come of it."""


@dataclass(frozen=True)
class Noticed:
    """How a fault showed: in which words, so many seconds after it struck."""

    words: str
    after: float | None = None


@dataclass
class Stage:
    """`folder`: of this fault alone. What is drawn depends on the seed and the fault, and on nothing else.

    `ends`: how the commands ended that ran last, one for each of `machines`.
    """

    folder: Path
    reference: Reference
    draw: random.Random
    run: SmallRun = field(init=False)
    machines: int = 1
    ends: tuple[Ended, ...] = ()
    _proven: bool = False

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.set_up()

    def set_up(self, settings: Mapping[str, Any] | None = None) -> None:
        """Other settings than the reference's; before anything is started."""
        untouched = self.reference.run
        self.run = SmallRun(self.folder, untouched.corpus, untouched.ranks, untouched.steps, settings or {})

    def other_rank(self) -> int:
        """Any but rank 0."""
        return self.draw.randrange(1, self.run.ranks)

    def step(self) -> int:
        """To strike in."""
        return self.draw.randint(EARLIEST, LATEST)

    def start(self, *strikes: Strike) -> None:
        """The command for the first time, to its end."""
        self.run.prepare()
        self._to_its_end(strikes)

    def expect_code(self, code: int, machine: int = 0) -> None:
        """Of the command that ran last; and that nothing of it is left."""
        ended = self.ends[machine]
        if ended.code is None:
            raise Unexpected(f"the command did not end in {LIMIT_SECONDS:.0f} s:\n{self._last_words()}")
        if ended.orphans:
            raise Unexpected("processes of the command outlived it")
        if ended.code != code:
            raise Unexpected(f"the command ended with {ended.code}, not {code}:\n{self._last_words()}")

    def expect_said(
        self, pattern: str, within_seconds: float | None = None, *, strike: int = 0, machine: int = 0
    ) -> Noticed:
        """A line with the pattern, in which `{host}` is this machine; within so many seconds after a strike, counted
        from 0 in their order."""
        ended = self.ends[machine]
        pattern = pattern.replace("{host}", re.escape(socket.gethostname()))
        line = ended.find(pattern)
        if line is None:
            raise Unexpected(f"nobody said {pattern!r}:\n{self._last_words()}")
        after = self.seconds_since_struck(line.at_nanoseconds, strike) if self._has_struck(strike) else None
        if within_seconds is not None and (after is None or not 0 <= after <= within_seconds):
            raise Unexpected(f"it was to be said within {within_seconds:g} s, not {after}: {line.text}")
        return Noticed(line.text.removeprefix("error: ").removeprefix("warning: "), after)

    def seconds_since_struck(self, at_nanoseconds: int, strike: int = 0) -> float:
        """How long a moment is after a strike."""
        if not self._has_struck(strike):
            raise Unexpected("nothing was struck")
        return (at_nanoseconds - read_struck(self.run.record_dir)[strike].at_nanoseconds) / 1e9

    def prove(self, same_state: bool = True) -> None:
        """Go on to the run's end, by the same command as a user would, and prove that nothing was lost.

        `same_state`: all that was trained is to be the same, and not the samples alone.
        """
        self._proven = True
        if any(ended.code != EXIT_DONE for ended in self.ends):
            self._to_its_end(())
            for machine in range(self.machines):
                self.expect_code(EXIT_DONE, machine)
        problem = self.reference.problem(self.run) if same_state else self.reference.samples_problem(self.run)
        if problem:
            raise Unexpected(problem)

    def finding(self, title: str, happen: Callable[["Stage"], Noticed]) -> Finding:
        """What comes of a fault."""
        started = time.perf_counter()
        noticed, problem = Noticed(""), None
        try:
            noticed = happen(self)
            if not self._proven:
                self.prove()
        except (Unexpected, GptdistError) as error:
            problem = str(error)
        seconds = time.perf_counter() - started
        return Finding(
            title,
            noticed=noticed.words,
            problem=problem,
            seconds=seconds,
            after=noticed.after,
            steps_lost=steps_lost(self.run),
        )

    def _last_words(self) -> str:
        return "\n--\n".join(ended.end() for ended in self.ends)

    def _has_struck(self, strike: int) -> bool:
        return strike < len(read_struck(self.run.record_dir))

    def _to_its_end(self, strikes: Sequence[Strike]) -> None:
        write_plan(self.run.record_dir, strikes)
        commands = [self.run.start(machine, self.machines) for machine in range(self.machines)]
        self.ends = tuple(command.wait(LIMIT_SECONDS) for command in commands)
