"""The lead decides for all ranks of a run: that they start, that they have failed or hang, whether they start again.

A state machine: agents' words and the time come in, orders go out through `post`. Knows no process and no socket, so it
is the same for one machine and for many. Which failure counts is `verdict.py`'s, who hangs is `hang.py`'s, and what
comes next `rules.py`'s to say.
"""

import os
import signal
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from gptdist.errors import EXIT_DONE, EXIT_FAILED, EXIT_RESUMABLE, LaunchError
from gptdist.monitor.heartbeat import StepTimes
from launch.cluster.time_limit import NO_TIME_LIMIT, TimeLimit
from launch.ranks.failure_report import RankStack, hang_report, hang_sentence, rank_list, whereabouts
from launch.ranks.forked_rank import FORWARDED
from launch.ranks.hang import MIDWAY, Hang, Patience, Standing, find_hang
from launch.ranks.messages import (
    Beats,
    Dump,
    End,
    Ended,
    Exit,
    Hello,
    Order,
    PassOn,
    Signalled,
    Stacks,
    Start,
    Word,
)
from launch.ranks.record import Record
from launch.ranks.roster import Roster
from launch.ranks.rules import RESTART, STOP, Decision, Failure
from launch.ranks.slow_ranks import WINDOW, SlowRanks
from launch.ranks.verdict import EXIT_INTERRUPTED, RankEnd, Verdict, judge

SETTLE_SECONDS = 1.0
"""After a failure, how long the other ranks may go on: how they end tells which one failed first by itself."""
KILLED_SETTLE_SECONDS = 0.2
"""The same after a kill from outside, which explains itself."""
ECHO_SETTLE_SECONDS = 5.0
"""The same while all that is known are errors of lost peers: the lost one is still to show."""
GRACE_SECONDS = 2.0
"""Between TERM and KILL for ranks that outlive a failed one."""
RESTART_GRACE_SECONDS = 0.5
"""The same where they make room for others, which go on from a checkpoint: nothing they hold is of use."""
STACKS_SECONDS = 4.5
"""For agents to collect stacks."""
LOOK_SECONDS = 0.25
"""Between looks for ranks that hang."""
COMPARE_SECONDS = 2.0
"""Between looks for slow ranks."""
WIND_DOWN_SECONDS = 30.0
"""A rank that is still there so long after KILL is stuck in its machine's kernel."""


@dataclass(frozen=True)
class Supervision:
    """What a supervised run has more than one that is only started: a record of its attempts, patience with ranks that
    hang, an eye on slow ones and on the time that is left."""

    record: Record
    patience: Patience
    slow_ranks: SlowRanks
    time_limit: TimeLimit = NO_TIME_LIMIT


@dataclass
class _Generation:
    """One set of ranks, from their start until all are gone."""

    number: int
    began: bool = False  # training has, so it is on record
    ends: dict[int, RankEnd] = field(default_factory=dict)
    standings: dict[int, Standing] = field(default_factory=dict)
    stacks: dict[int, RankStack] = field(default_factory=dict)
    recent: dict[int, deque[StepTimes]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=2 * WINDOW)))
    failed_at: float | None = None
    looked_at: float = 0.0
    compared_at: float = 0.0


class Lead:
    """Of `world_size` ranks. `meet` opens the port where they meet and says where it is; `post` sends an order to an
    agent, which is known by its first rank. `refusal`: what all agents are to hear instead of a start."""

    def __init__(
        self,
        world_size: int,
        meet: Callable[[], tuple[str, int]],
        post: Callable[[int, Order], None],
        supervision: Supervision | None = None,
        refusal: Verdict | None = None,
        join_seconds: float = 0.0,
        limit_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.verdict: Verdict | None = None
        self._world_size = world_size
        self._meet = meet
        self._post = post
        self._supervision = supervision
        self._clock = clock
        self._roster = Roster(world_size)
        self._generation = _Generation(-1)  # none yet
        self._deadline = clock() + join_seconds
        self._limit_seconds = limit_seconds
        self._limit = None if limit_seconds is None else clock() + limit_seconds
        self._stop_signal: int | None = None
        self._stopped_by: str | None = None
        self._interrupted: set[int] = set()  # agents that had a Ctrl-C
        self._passed_on: set[int] = set()
        self._hang: Hang | None = None
        self._failed: tuple[Verdict, Failure] | None = None
        self._refusal = refusal
        self._next: Verdict | None = None  # how the run ends once its ranks are gone; None: they start again
        self._doing = self._gather

    # -- what comes in -----------------------------------------------------------------------------------------------

    def welcome(self, hello: Hello) -> str | None:
        """An agent that has come; or why it cannot be one of ours."""
        return self._roster.add(hello)

    def hear(self, agent: int, word: Word) -> None:
        """What an agent says. Of an earlier generation, it is too late to count."""
        generation, own = self._generation, self._roster[agent].ranks
        match word:
            case Beats() if word.generation == generation.number:
                for standing in word.standings:
                    if standing.global_rank in own:
                        self._note(standing)
            case Ended() if word.generation == generation.number and word.end.global_rank in own:
                generation.ends[word.end.global_rank] = self._on_our_clock(word)
            case Stacks() if word.generation == generation.number:
                stacks = {stack.global_rank: stack for stack in word.stacks if stack.global_rank in own}
                generation.stacks.update(stacks)
            case Signalled() if word.number in FORWARDED:
                self._pass_on(agent, word.number)

    def lose(self, agent: int, why: str) -> None:
        """An agent is gone, and its ranks with it."""
        if self._generation.number < 0:
            self._roster.forget(agent)
            return
        lost = self._roster[agent]
        if lost.lost:
            return
        lost.lost = True
        if self.verdict is not None or self._next is not None:
            return
        message = f"lost {lost.host} with {rank_list(lost.ranks)}: {why}. {self._where(lost.ranks.start)}".rstrip()
        self._fail(Verdict(EXIT_RESUMABLE, message), Failure(message, culprits=(lost.host,), node_lost=True))

    def tick(self) -> None:
        """Whatever the time has come for."""
        if self.verdict is None:
            self._doing(self._clock())

    # -- what it is doing --------------------------------------------------------------------------------------------

    def _gather(self, now: float) -> None:
        """Until all agents are there."""
        absent = self._roster.absent()
        if not absent and self._refusal is not None:
            self._end(self._refusal)
        elif not absent:
            self._start(self._generation.number + 1)
        elif now > self._deadline:
            message = (
                f"of {self._world_size} ranks, {len(absent)} did not come in time: {rank_list(absent)}. See what these "
                "printed; raise launch.timeout if they are only slow."
            )
            if self._supervision:
                self._supervision.record.start(0, self._roster.hosts(), self._world_size)
            self._fail(Verdict(EXIT_FAILED, message), Failure(message, node_lost=True))

    def _start(self, number: int) -> None:
        try:
            address, port = self._meet()
        except LaunchError as error:
            if number == 0:
                raise
            self._fail(Verdict(error.exit_code, str(error)), Failure(str(error), error.exit_code, deliberate=True))
            return
        self._generation = _Generation(number)
        self._doing = self._run
        if self._supervision:
            self._supervision.patience.restart()
            self._supervision.record.start(number, self._roster.hosts(), self._world_size)
        self._tell_all(Start(generation=number, master_address=address, master_port=port))

    def _run(self, now: float) -> None:
        """Until all ranks have ended, one has failed, they hang, or the time is over."""
        generation = self._generation
        if self._limit is not None and now > self._limit:
            late = ", ".join(map(str, self._running()))
            self._end(Verdict(EXIT_FAILED, f"rank {late} still ran after {self._limit_seconds:g} s, the limit; ended."))
        elif any(not end.is_good for end in generation.ends.values()):
            generation.failed_at = generation.failed_at or now
            if not self._running() or now > generation.failed_at + self._settle_seconds():
                self._judge()
        elif not self._running():
            self._judge()
        elif self._supervision and now > generation.looked_at + LOOK_SECONDS:
            generation.looked_at = now
            self._look_for_hang(self._supervision.patience, now)
            self._look_for_slow_ranks(self._supervision, now)
            self._look_at_the_clock(self._supervision.time_limit)

    def _await_stacks(self, now: float) -> None:
        asked = {rank for rank in self._running() if not self._roster.agent_of(rank).lost}
        if asked <= self._generation.stacks.keys() or now > self._deadline:
            assert self._hang is not None
            self._say(hang_report(self._hang, self._roster.host_of, self._generation.stacks))
            message = hang_sentence(self._hang, self._roster.host_of)
            hosts = tuple(dict.fromkeys(map(self._roster.host_of, self._hang.culprits)))
            self._fail(Verdict(EXIT_FAILED, message), Failure(message, culprits=hosts))

    def _wind_down(self, now: float) -> None:
        """Until the last rank is gone; then others start, or it is over."""
        left = self._running()
        if left and now > self._deadline:
            for agent in {self._roster.agent_of(rank).hello.first_rank for rank in left}:
                self.lose(agent, "its ranks cannot be ended")
        elif left:
            return
        elif self._next is not None:
            self._tell_all(Exit(code=self._next.exit_code))
            self.verdict = self._next
        elif self._stop_signal is not None and self._failed is not None:
            self._fail(*self._failed)  # now it is one of a run that stops
        else:
            self._start(self._generation.number + 1)

    # -- failures ----------------------------------------------------------------------------------------------------

    def _judge(self) -> None:
        ends = tuple(self._generation.ends.values())
        verdict = judge(ends, self._world_size, self._stop_signal, "GPTDIST_DEBUG" in os.environ)
        if verdict.exit_code in (EXIT_DONE, EXIT_RESUMABLE, EXIT_INTERRUPTED):
            if self._supervision:
                self._supervision.record.ended(verdict.exit_code, self._stopped_by, self._standings())
            self._end(verdict)
            return
        culprits: tuple[str, ...] = ()
        if verdict.global_rank is not None and not verdict.deliberate:
            culprits = (self._roster.host_of(verdict.global_rank),)
            verdict = replace(verdict, message=f"{verdict.message} {self._where(verdict.global_rank)}".rstrip())
        failure = Failure(verdict.message, verdict.exit_code, culprits, deliberate=verdict.deliberate)
        if verdict.unfit:  # others may be fit, so it need not fail again
            failure = replace(failure, culprits=verdict.unfit, unfit=True, deliberate=False)
        self._fail(verdict, failure)

    def _look_for_hang(self, patience: Patience, now: float) -> None:
        running = [self._generation.standings.get(rank) for rank in self._running()]
        known = [standing for standing in running if standing is not None]
        if len(known) < len(running):
            return
        self._hang = find_hang(known, patience)
        if self._hang is not None:
            self._deadline = now + STACKS_SECONDS
            self._doing = self._await_stacks
            self._tell_all(Dump())

    def _look_at_the_clock(self, time_limit: TimeLimit) -> None:
        """Ask the ranks to save and end while there is time for it."""
        generation = self._generation
        if self._stop_signal is not None or not generation.began:
            return
        saves = [standing.save_seconds for standing in generation.standings.values()]
        steps = [recent[-1].seconds for recent in generation.recent.values() if recent]
        if time_limit.is_near(max(saves, default=0.0), max(steps, default=0.0)):
            left = time_limit.seconds_left
            self._say(f"stopping: {left:.0f} s of the job's time are left; the ranks save, and the run goes on later")
            # As if the scheduler had sent its warning; that may come as well.
            self._stop_signal, self._stopped_by = signal.SIGUSR1, "its time limit"
            self._passed_on.add(signal.SIGUSR1)
            self._tell_all(PassOn(number=signal.SIGUSR1))

    def _look_for_slow_ranks(self, supervision: Supervision, now: float) -> None:
        generation = self._generation
        if now < generation.compared_at + COMPARE_SECONDS or not generation.recent.keys() >= set(self._running()):
            return
        generation.compared_at = now
        for slow in supervision.slow_ranks.look(generation.recent):
            text = f"{slow.describe()}; it is on {self._roster.host_of(slow.global_rank)}"
            self._say(f"warning: {text}")
            supervision.record.note("slow rank", text)

    def _fail(self, verdict: Verdict, failure: Failure) -> None:
        """The ranks have failed: what comes next, and an end of those that are left."""
        self._failed = verdict, failure
        decision = Decision(STOP, verdict.exit_code)
        if self._supervision:
            failure = replace(failure, stopping=self._stop_signal is not None)
            decision = self._supervision.record.failed(failure, self._standings())
        if decision.action == RESTART:
            self._say(verdict.traceback.rstrip())
            self._say(f"{verdict.message}\nrestarting all ranks in place, {self._saved()}")
            self._end(None)
        else:
            message = f"{verdict.message}\n{decision.why}".rstrip()
            self._end(replace(verdict, exit_code=decision.exit_code, message=message))

    def _end(self, verdict: Verdict | None, grace_seconds: float = GRACE_SECONDS) -> None:
        """End the ranks that are left, and then, with a verdict, the run."""
        grace_seconds = grace_seconds if verdict else RESTART_GRACE_SECONDS
        self._next = verdict
        self._deadline = self._clock() + grace_seconds + WIND_DOWN_SECONDS
        self._doing = self._wind_down
        if self._running():
            self._tell_all(End(grace_seconds=grace_seconds))

    def _settle_seconds(self) -> float:
        bad = [end for end in self._generation.ends.values() if not end.is_good]
        if all(end.report and end.report.echo for end in bad):
            return ECHO_SETTLE_SECONDS
        explained = any(end.premature or end.signal_number == signal.SIGKILL for end in bad)
        return KILLED_SETTLE_SECONDS if explained else SETTLE_SECONDS

    # -- signals -----------------------------------------------------------------------------------------------------

    def _pass_on(self, agent: int, number: int) -> None:
        """A signal that an agent got. The agents of a job all get the same one, and ranks are to get it once."""
        if number == signal.SIGINT and agent in self._interrupted:
            if self._supervision and self._generation.number >= 0 and self._next is None:
                self._supervision.record.ended(EXIT_INTERRUPTED, "SIGINT", self._standings())
            self._end(Verdict(EXIT_INTERRUPTED, "interrupted; the newest checkpoint, if any, is as it was."), 0.0)
            return
        if number == signal.SIGINT:
            self._interrupted.add(agent)
        if number in self._passed_on:
            return
        self._passed_on.add(number)
        self._stop_signal, self._stopped_by = number, signal.Signals(number).name
        if self._doing == self._gather:
            self._end(Verdict(_stopped_code(number)))
            return
        if number == signal.SIGINT:
            self._say("stopping: the ranks save and exit; Ctrl-C again ends them at once")
        self._tell_all(PassOn(number=signal.SIGTERM if number == signal.SIGINT else number))

    # -- who and where -----------------------------------------------------------------------------------------------

    def _note(self, standing: Standing) -> None:
        generation = self._generation
        generation.standings[standing.global_rank] = standing
        if self._supervision is None:
            return
        self._supervision.patience.learn(standing)
        generation.recent[standing.global_rank].extend(standing.times)
        if not generation.began and standing.phase in MIDWAY:
            generation.began = True
            self._supervision.record.began(standing.times[0].step - 1 if standing.times else standing.step)

    def _running(self) -> list[int]:
        """Ranks that were started and have not ended, as far as their agents can tell."""
        if self._generation.number < 0:
            return []
        return [rank for rank in self._roster.reachable() if rank not in self._generation.ends]

    def _standings(self) -> list[Standing]:
        return list(self._generation.standings.values())

    def _where(self, rank: int) -> str:
        standing = self._generation.standings.get(rank)
        if self._supervision is None or standing is None:
            return ""
        return f"({whereabouts(standing, self._roster.host_of(rank))})"

    def _saved(self) -> str:
        saved = [standing.saved_step for standing in self._standings() if standing.saved_step is not None]
        return f"from step {max(saved)}" if saved else "from the beginning"

    def _on_our_clock(self, word: Ended) -> RankEnd:
        """Clocks of two machines do not agree; what was a second ago is a second ago."""
        shift = int(self._clock() * 1e9) - word.now_nanoseconds
        report = word.end.report
        if report is not None:
            report = replace(report, at_nanoseconds=report.at_nanoseconds + shift)
        return replace(word.end, report=report, at_nanoseconds=word.end.at_nanoseconds + shift)

    def _tell_all(self, order: Order) -> None:
        for agent in self._roster.present():
            self._post(agent, order)

    @staticmethod
    def _say(text: str) -> None:
        if text:
            print(text, file=sys.stderr, flush=True)


def _stopped_code(number: int) -> int:
    return EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_RESUMABLE
