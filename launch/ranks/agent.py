"""An agent: the parent of ranks on one machine. It starts them warm, relays what they say, and obeys the lead.

One select loop and no thread. Knows its own ranks and nothing of others, and of the lead only that it is told things
and gives orders (`lead_link.py`). Ranks die with their agent, whatever kills it.
"""

import gc
import os
import selectors
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from gptdist.world import World
from launch.ranks.failure_report import RankStack
from launch.ranks.forked_rank import FORWARDED, Target
from launch.ranks.messages import Beats, Dump, End, Ended, Order, PassOn, Signalled, Stacks, Start, Word
from launch.ranks.place import Place
from launch.ranks.rank_process import RankProcess, fork_rank
from launch.ranks.stacks import ask_stacks, render_stacks
from launch.ranks.verdict import Verdict
from launch.ranks.warm import Signals
from launch.rendezvous import LOOPBACK, open_listener

TURN_SECONDS = 0.1
LOOK_SECONDS = 0.5
"""Between looks at where ranks stand."""
KILLED_SECONDS = 10.0
"""How long to wait, at the very end, for ranks that were killed."""


class LeadLink(Protocol):
    """The way to the lead. What it registers in the agent's selector is to be called when it can be read."""

    @property
    def verdict(self) -> Verdict | None:
        """How it ended, once it has."""

    def say(self, word: Word) -> None:
        """Tell the lead."""

    def turn(self) -> list[Order]:
        """Called in every turn of the agent's loop: what the lead wants by now."""

    def close(self) -> None:
        """Let the others know, and let go."""


class Meeting:
    """The port where ranks meet, opened anew for each set of them, by the agent of the first rank."""

    def __init__(self, place: Place, port: int) -> None:
        """`port`: 0 for a free one."""
        self._place = place
        self._port = port
        self._listener: socket.socket | None = None

    def open(self) -> tuple[str, int]:
        """Its address. Raises LaunchError where the port is taken."""
        self.close()
        if self._place.world_size == 1:
            return LOOPBACK, 0
        one_node = self._place.is_one_node
        self._listener = open_listener(LOOPBACK if one_node else "", self._port)
        return LOOPBACK if one_node else self._place.lead_host, self._listener.getsockname()[1]

    @property
    def fd(self) -> int:
        """The socket that listens there; -1 where there is none in this process."""
        return -1 if self._listener is None else self._listener.fileno()

    def close(self) -> None:
        """From now on it is the first rank's alone."""
        if self._listener is not None:
            self._listener.close()
        self._listener = None


@dataclass(frozen=True)
class Work:
    """What a rank runs: `target(world, payload)`. `threads`: for torch's own work; None leaves that to torch."""

    target: str | Target
    payload: Any
    threads: int | None


class Agent:
    """The ranks at `place`. `private_fds`: what ranks must not keep open."""

    def __init__(
        self,
        place: Place,
        work: Work,
        signals: Signals,
        selector: selectors.DefaultSelector,
        link: LeadLink,
        meeting: Meeting,
        private_fds: Sequence[int] = (),
    ) -> None:
        self._place = place
        self._work = work
        self._signals = signals
        self._selector = selector
        self._link = link
        self._meeting = meeting
        self._private_fds = private_fds
        self._ranks: list[RankProcess] = []
        self._generation = -1
        self._kill_at: float | None = None
        self._looked_at = self._woke_at = time.monotonic()
        self._awake_seconds = 0.0
        self._wakeup_fd = signals.wakeup_fds[0]
        selector.register(self._wakeup_fd, selectors.EVENT_READ, self._drain_wakeups)

    def run(self) -> Verdict:
        """Until the lead says that it is over; nothing of ours is left then."""
        try:
            while self._link.verdict is None:
                self._turn()
            return self._link.verdict
        finally:
            self._kill_ranks()
            self._link.close()
            self._selector.unregister(self._wakeup_fd)

    def _turn(self) -> None:
        for key, _ in self._selector.select(TURN_SECONDS):
            if not key.data():
                self._selector.unregister(key.fd)
        now = time.monotonic()
        # A turn that took long was slept through: a stopped job, a suspended machine.
        self._awake_seconds += min(now - self._woke_at, 2 * LOOK_SECONDS)
        self._woke_at = now
        for number in self._signals.taken():
            self._link.say(Signalled(number=number))
        self._reap()
        if now - self._looked_at >= LOOK_SECONDS:
            self._look(self._ranks)
        if self._kill_at is not None and now > self._kill_at:
            self._send(signal.SIGKILL)
        for order in self._link.turn():
            self._obey(order)

    def _obey(self, order: Order) -> None:
        match order:
            case Start():
                self._start(order)
            case PassOn():
                self._send(order.number)
            case Dump():
                self._tell_stacks()
            case End():
                self._send(signal.SIGTERM if order.grace_seconds else signal.SIGKILL)
                self._kill_at = time.monotonic() + order.grace_seconds

    # -- ranks -------------------------------------------------------------------------------------------------------

    def _start(self, order: Start) -> None:
        self._let_go()
        self._generation = order.generation
        self._kill_at = None
        gc.freeze()  # a collection in one rank must not copy the pages that all share, nor look at what stays
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # a fresh rank must not run the agent's handlers
        try:
            for index in range(self._place.local_ranks):
                world = self._place.world(index, order, self._meeting.fd if index == 0 else -1)
                rank = fork_rank(world, self._work.target, self._work.payload, self._work.threads, self._shed(world))
                rank.watch(self._selector)
                self._ranks.append(rank)
        finally:
            gc.unfreeze()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            self._meeting.close()

    def _shed(self, world: World) -> list[int]:
        """The agent's file descriptors, which a rank must not keep: the peer of a pipe would wait for its end, and a
        lock would outlive the agent."""
        fds = [key.fd for key in self._selector.get_map().values()]
        fds += [self._selector.fileno(), self._signals.wakeup_fds[1], *self._private_fds]
        fds += [rank.pad for rank in self._ranks]
        return fds if world.is_first or self._meeting.fd < 0 else [*fds, self._meeting.fd]

    def _reap(self) -> None:
        for rank in self._ranks:
            if rank.reap():
                assert rank.end is not None
                self._look([rank])  # where it stood in the end
                now = time.monotonic_ns()
                self._link.say(Ended(generation=self._generation, end=rank.end, now_nanoseconds=now))

    def _look(self, ranks: Sequence[RankProcess]) -> None:
        """Tell the lead where these ranks stand."""
        if ranks is self._ranks:
            awake, self._awake_seconds = self._awake_seconds, 0.0
            self._looked_at = time.monotonic()
            ranks = [rank for rank in ranks if rank.end is None]
        else:
            awake = 0.0
        if ranks:
            standings = tuple(rank.look(awake) for rank in ranks)
            self._link.say(Beats(generation=self._generation, standings=standings))

    def _tell_stacks(self) -> None:
        running = {rank.pid: rank for rank in self._ranks if rank.end is None}
        found = ask_stacks({pid: rank.pad for pid, rank in running.items()})
        stacks = tuple(
            RankStack(running[pid].global_rank, render_stacks(stack), stack.waits_in) for pid, stack in found.items()
        )
        self._link.say(Stacks(generation=self._generation, stacks=stacks))

    def _send(self, number: int) -> None:
        for rank in self._ranks:
            rank.send(number)

    def _kill_ranks(self) -> None:
        """End what still runs, and wait for it; one that is stuck in the kernel is left to it."""
        self._send(signal.SIGKILL)
        deadline = time.monotonic() + KILLED_SECONDS
        while any(rank.end is None for rank in self._ranks) and time.monotonic() < deadline:
            for rank in self._ranks:
                rank.reap()
            time.sleep(0.002)
        self._let_go()

    def _let_go(self) -> None:
        for rank in self._ranks:
            rank.close(self._selector)
        self._ranks = []

    def _drain_wakeups(self) -> bool:
        with suppress(BlockingIOError):
            os.read(self._wakeup_fd, 4096)
        return True
