"""The record that a lead keeps of a run's attempts, and what it lets follow a failure.

Knows the run's folder and the rules; nothing of agents. A record that cannot be written is said once and never stops
training. The file is made only once training has begun, so that a mistake leaves nothing behind; in a scheduler's
allocation at once, so that kills before that are counted too.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from gptdist.errors import EXIT_DONE, EXIT_RESUMABLE, StorageError
from launch.ranks.hang import Standing
from launch.ranks.place import Allocation
from launch.ranks.rules import DONE, REQUEUE, STOP, Decision, Failure, decide
from launch.runs.attempts import Attempt, begin, end, note, read_attempts

_LONGEST_REASON = 500


class Record:
    """Of the attempts that one lead makes."""

    def __init__(self, run_dir: Path, allocation: Allocation, *, can_restart: bool, fresh: bool) -> None:
        """`fresh`: the run begins anew, so that what was before counts for nothing."""
        self._run_dir = run_dir
        self._allocation = allocation
        self._can_restart = can_restart
        self._fresh = fresh
        self._warned = False
        earlier = self._read()
        same = [attempt for attempt in earlier if attempt.allocation == allocation.name]
        if allocation.can_requeue:
            self._restart = allocation.restart
            generations = [attempt.generation for attempt in same if attempt.restart == allocation.restart]
        else:
            self._restart = 1 + max((attempt.restart for attempt in same), default=-1)
            generations = []
        self._first_generation = 1 + max(generations, default=-1)  # two steps of one job have one record
        # Whoever starts a run by hand has seen what came before.
        self._attempts = earlier if allocation.can_requeue and not fresh else []
        self._current: Attempt | None = None
        self._written = False

    def start(self, generation: int, hosts: Sequence[str], ranks: int) -> None:
        """All ranks start."""
        fresh = self._fresh and self._current is None
        if self._current is not None:
            self._attempts.append(self._current)
        self._current = Attempt(
            self._allocation.name,
            self._restart,
            self._first_generation + generation,
            tuple(dict.fromkeys(hosts)),
            ranks,
            time.time(),
            start_step=max((attempt.saved_step or attempt.start_step for attempt in self._attempts), default=0),
            fresh=fresh,
        )
        self._written = False
        if generation > 0 or self._allocation.can_requeue:
            self._begin(self._current)

    def began(self, start_step: int) -> None:
        """Training begins."""
        self._begin(replace(self._attempt, start_step=start_step))

    def failed(self, failure: Failure, standings: Sequence[Standing]) -> Decision:
        """The attempt has failed: what comes next. May be called again where that comes to nothing."""
        ended = replace(
            self._progressed(standings),
            reason=" ".join(failure.reason.split())[:_LONGEST_REASON],
            failed=not failure.stopping,
            culprits=failure.culprits,
        )
        attempts = [*self._attempts, ended]
        can_requeue = self._allocation.can_requeue
        decision = decide(attempts, failure, can_restart=self._can_restart, can_requeue=can_requeue)
        culprits = decision.exclude if decision.action == REQUEUE else ended.culprits
        self._end(replace(ended, culprits=culprits, exit_code=decision.exit_code, action=decision.action))
        return decision

    def ended(self, exit_code: int, stopped_by: str | None, standings: Sequence[Standing]) -> None:
        """The attempt has ended well. `stopped_by`: the signal that asked for it, or its time limit."""
        action = DONE if exit_code == EXIT_DONE else STOP
        if exit_code == EXIT_RESUMABLE and stopped_by and self._allocation.can_requeue:
            action = REQUEUE
        reason = f"stopped by {stopped_by}" if stopped_by else None
        self._end(replace(self._progressed(standings), reason=reason, exit_code=exit_code, action=action))

    def note(self, kind: str, text: str) -> None:
        """Something worth knowing that ends nothing."""
        if self._written:
            self._write(lambda run_dir, attempt: note(run_dir, kind, text), self._attempt)

    @property
    def _attempt(self) -> Attempt:
        assert self._current is not None
        return self._current

    def _progressed(self, standings: Sequence[Standing]) -> Attempt:
        """The attempt, ended now."""
        attempt = self._attempt
        saved = [standing.saved_step for standing in standings if standing.saved_step is not None]
        last = max((standing.step for standing in standings), default=0)
        return replace(
            attempt,
            ended=time.time(),
            last_step=last if last > attempt.start_step else None,
            saved_step=max(saved, default=None),
        )

    def _begin(self, attempt: Attempt) -> None:
        self._current = attempt
        self._written = True
        self._write(begin, attempt)

    def _end(self, attempt: Attempt) -> None:
        self._current = attempt
        if self._written:
            self._write(end, attempt)

    def _write(self, write: Callable[[Path, Attempt], None], attempt: Attempt) -> None:
        try:
            write(self._run_dir, attempt)
        except StorageError as error:
            self._warn(error)

    def _read(self) -> list[Attempt]:
        try:
            return read_attempts(self._run_dir)
        except StorageError as error:
            self._warn(error)
            return []

    def _warn(self, error: StorageError) -> None:
        if not self._warned:
            print(f"warning: {error} The run goes on without a record of it.", file=sys.stderr, flush=True)
        self._warned = True
