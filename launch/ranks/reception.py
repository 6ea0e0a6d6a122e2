"""Where agents on other machines, or in other tasks of a job, come to the lead: who is let in, heard and missed.

Knows sockets, handshakes and silence; what is said goes to the lead, which is told when an agent is gone.
"""

import selectors
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from launch.ranks.channel import LONGEST_LINE as LONGEST_KNOWN
from launch.ranks.channel import Channel, Closed
from launch.ranks.handshake import LONGEST_LINE, LeadsHandshake, Refused
from launch.ranks.lead import STACKS_SECONDS, Lead
from launch.ranks.messages import Alive, Dump, Order, Unreadable, encode, read_word

SILENCE_SECONDS = 5.0
"""An agent that says nothing for so long is lost, and its machine with it."""
STRANGER_SECONDS = 10.0
"""For a handshake."""
MOST_STRANGERS = 4096
ALIVE_SECONDS = 1.0
"""Between signs of life to agents."""
FAREWELL_SECONDS = 3.0
"""For agents to take their leave, so that none loses the last order."""


@dataclass
class _Stranger:
    channel: Channel
    handshake: LeadsHandshake
    since: float = field(default_factory=time.monotonic)


@dataclass
class _Member:
    channel: Channel
    silent_seconds: float = 0.0


class Reception:
    """At `listener`, which it owns. `new_handshake`: for each that comes."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        listener: socket.socket,
        lead: Lead,
        new_handshake: Callable[[], LeadsHandshake],
    ) -> None:
        self._selector = selector
        self._listener = listener
        self._lead = lead
        self._new_handshake = new_handshake
        self._strangers: dict[int, _Stranger] = {}
        self._members: dict[int, _Member] = {}  # by first rank
        self._lost: dict[int, str] = {}  # not yet told to the lead
        self._greeted_at = 0.0
        listener.setblocking(False)
        selector.register(listener.fileno(), selectors.EVENT_READ, self._accept)

    def send(self, agent: int, order: Order) -> None:
        """Tell an agent, if it is still there."""
        member = self._members.get(agent)
        if member is None:
            return
        if isinstance(order, Dump):
            member.silent_seconds = -STACKS_SECONDS  # it is busy for so long
        try:
            member.channel.send(encode(order))
        except Closed as why:
            self._lost[agent] = str(why)  # the lead is in the middle of a decision

    def turn(self, awake_seconds: float) -> None:
        """Who has gone or says nothing? `awake_seconds`: since the last turn, of the time that we were awake."""
        now = time.monotonic()
        for stranger in [one for one in self._strangers.values() if now > one.since + STRANGER_SECONDS]:
            self._dismiss(stranger)
        for agent, member in self._members.items():
            member.silent_seconds += awake_seconds
            if member.silent_seconds > SILENCE_SECONDS:
                self._lost[agent] = f"nothing was heard of it for {SILENCE_SECONDS:g} s"
        for agent, why in self._lost.items():
            self._dismiss_member(agent)
            self._lead.lose(agent, why)
        self._lost = {}
        greet = now > self._greeted_at + ALIVE_SECONDS
        self._greeted_at = now if greet else self._greeted_at
        for agent, member in self._members.items():
            if greet:
                self.send(agent, Alive())
            else:
                with suppress(Closed):  # noticed when it is read
                    member.channel.flush()

    def close(self) -> None:
        """Let all have heard the last order, then let go."""
        self._selector.unregister(self._listener.fileno())
        self._listener.close()
        for stranger in list(self._strangers.values()):
            self._dismiss(stranger)
        deadline = time.monotonic() + FAREWELL_SECONDS
        for member in self._members.values():
            member.channel.end()
        while self._members and time.monotonic() < deadline:
            for agent, member in list(self._members.items()):
                try:
                    member.channel.receive()
                except Closed:
                    self._dismiss_member(agent)
            time.sleep(0.01)
        for agent in list(self._members):
            self._dismiss_member(agent)

    # -- what the selector calls; True: again --------------------------------------------------------------------------

    def _accept(self) -> bool:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return True  # it has gone again
        channel = Channel(connection, LONGEST_LINE)
        if len(self._strangers) >= MOST_STRANGERS:
            channel.close()
            return True
        stranger = _Stranger(channel, self._new_handshake())
        fd = channel.fileno()
        self._strangers[fd] = stranger
        self._selector.register(fd, selectors.EVENT_READ, lambda: self._hear_stranger(stranger))
        try:
            channel.send(stranger.handshake.greeting())
        except Closed:
            self._dismiss(stranger)
        return True

    def _hear_stranger(self, stranger: _Stranger) -> bool:
        try:
            lines = stranger.channel.receive()
            if not lines:
                return True
            hello, answer = stranger.handshake.check(lines[0])
            refused = self._lead.welcome(hello)
            if refused:
                raise Refused(refused)
        except Refused as why:
            with suppress(Closed):
                stranger.channel.send(LeadsHandshake.refuse(str(why)))
            self._dismiss(stranger)
            return True
        except Closed:
            self._dismiss(stranger)
            return True
        agent, channel = hello.first_rank, stranger.channel
        del self._strangers[channel.fileno()]
        channel.longest_line = LONGEST_KNOWN
        self._members[agent] = _Member(channel)
        self._selector.modify(channel.fileno(), selectors.EVENT_READ, lambda: self._hear(agent))
        try:
            channel.send(answer)
        except Closed as why:
            self._lost[agent] = str(why)
        return True

    def _hear(self, agent: int) -> bool:
        member = self._members.get(agent)
        if member is None:
            return True
        try:
            lines = member.channel.receive()
            member.silent_seconds = min(member.silent_seconds, 0.0)
            for line in lines:
                self._lead.hear(agent, read_word(line))
        except (Closed, Unreadable) as why:
            self._lost[agent] = str(why)
            self._selector.unregister(member.channel.fileno())
        return True

    def _dismiss(self, stranger: _Stranger) -> None:
        fd = stranger.channel.fileno()
        if self._strangers.pop(fd, None) is not None:
            self._selector.unregister(fd)
            stranger.channel.close()

    def _dismiss_member(self, agent: int) -> None:
        channel = self._members.pop(agent).channel
        with suppress(KeyError):
            self._selector.unregister(channel.fileno())
        channel.close()
