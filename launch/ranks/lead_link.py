"""The way from an agent to the lead: a call where both are in one process, else a connection.

Knows how to find the lead and when it is lost; not what is said. Everything but finding it happens in the agent's
select loop.
"""

import selectors
import socket
import time
from collections.abc import Callable
from contextlib import suppress

from gptdist.errors import EXIT_FAILED, LaunchError
from launch.ranks.channel import Channel, Closed
from launch.ranks.handshake import AgentsHandshake, Refused
from launch.ranks.lead import Lead
from launch.ranks.messages import Alive, Exit, Hello, Order, Unreadable, Word, encode, read_order
from launch.ranks.place import Place
from launch.ranks.reception import Reception
from launch.ranks.verdict import Verdict

TICK_SECONDS = 0.05
"""The lead looks around so often at most, however many agents talk to it."""
LEAD_SILENCE_SECONDS = 15.0
"""A lead that says nothing for so long is lost. It may have to wait for a shared disk, so it has more time than we."""
ALIVE_SECONDS = 1.0
GREETING_SECONDS = 3.0
"""For an answer at a port; the lead's may take longer, while it still imports: then it is asked again."""
RETRY_SECONDS = 0.3
_LONGEST_AWAKE = 1.0


class LeadHere:
    """The lead in this process. `own`: the agent here; `reception`: where others come, None where there are none."""

    def __init__(self, own: Hello) -> None:
        self._own = own
        self._orders: list[Order] = []
        self._ticked_at = time.monotonic()

    def appoint(self, lead: Lead, reception: Reception | None) -> None:
        """Whom to be the way to. The lead needs `post` before it can be made."""
        self._lead = lead
        self._reception = reception
        lead.welcome(self._own)

    def post(self, agent: int, order: Order) -> None:
        """Deliver an order of the lead's."""
        if agent == self._own.first_rank:
            self._orders.append(order)
        elif self._reception is not None:
            self._reception.send(agent, order)

    @property
    def verdict(self) -> Verdict | None:
        return self._lead.verdict

    def say(self, word: Word) -> None:
        self._lead.hear(self._own.first_rank, word)

    def turn(self) -> list[Order]:
        since = time.monotonic() - self._ticked_at
        if since >= TICK_SECONDS:
            self._ticked_at += since
            if self._reception is not None:
                self._reception.turn(min(since, _LONGEST_AWAKE))
            self._lead.tick()
        orders, self._orders = self._orders, []
        return orders

    def close(self) -> None:
        if self._reception is not None:
            self._reception.close()


class LeadAway:
    """The lead at the other end of `channel`, of a finished handshake."""

    def __init__(self, selector: selectors.BaseSelector, channel: Channel, host: str) -> None:
        self.verdict: Verdict | None = None
        self._selector = selector
        self._channel = channel
        self._host = host
        self._orders: list[Order] = []
        self._turned_at = time.monotonic()
        self._silent_seconds = self._quiet_seconds = 0.0
        selector.register(channel.fileno(), selectors.EVENT_READ, self._hear)
        self._hear()  # what came with the handshake's last line; the selector may have nothing to tell of it

    def say(self, word: Word) -> None:
        try:
            self._channel.send(encode(word))
            self._quiet_seconds = 0.0
        except Closed as why:
            self._lose(str(why))

    def turn(self) -> list[Order]:
        since = time.monotonic() - self._turned_at
        self._turned_at += since
        self._silent_seconds += min(since, _LONGEST_AWAKE)
        self._quiet_seconds += since
        if self._silent_seconds > LEAD_SILENCE_SECONDS:
            self._lose(f"nothing was heard of it for {LEAD_SILENCE_SECONDS:g} s")
        if self._quiet_seconds > ALIVE_SECONDS:
            self.say(Alive())
        orders, self._orders = self._orders, []
        return orders

    def close(self) -> None:
        with suppress(KeyError):
            self._selector.unregister(self._channel.fileno())
        self._channel.end()
        self._channel.close()

    def _hear(self) -> bool:
        self._silent_seconds = 0.0
        try:
            for line in self._channel.receive():
                order = read_order(line)
                self._orders.append(order)
                if isinstance(order, Exit):
                    self.verdict = Verdict(order.code)
            return True
        except (Closed, Unreadable) as why:
            self._lose(str(why))
            return False

    def _lose(self, why: str) -> None:
        if self.verdict is None:
            message = f"lost the agent on {self._host} that leads the run: {why}; the ranks here were ended."
            self.verdict = Verdict(EXIT_FAILED, message)


def find_lead(place: Place, hello: Hello, read_key: Callable[[], bytes], seconds: float) -> Channel:
    """A connection to the lead, at whichever of its ports it listens. Raises LaunchError where there is none."""
    deadline = time.monotonic() + seconds
    problems: dict[int, str] = {}
    while True:
        for port in place.lead_ports:
            try:
                return _introduce(place, port, AgentsHandshake(place.identity, read_key(), hello))
            except (Closed, Refused) as why:
                problems[port] = str(why)
            except OSError as error:
                problems[port] = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise LaunchError(
                f"The agent of rank {place.first_rank} found no lead on {place.lead_host} within {seconds:g} s. Ports: "
                f"{', '.join(f'{port} ({why})' for port, why in problems.items())}. Check that the first host started "
                "too, and that these ports are open between hosts; raise launch.timeout if it starts slowly."
            )
        time.sleep(RETRY_SECONDS)


def _introduce(place: Place, port: int, handshake: AgentsHandshake) -> Channel:
    channel = Channel(socket.create_connection((place.lead_host, port), timeout=GREETING_SECONDS))
    try:
        channel.send(handshake.introduce(_await_line(channel)))
        handshake.check(_await_line(channel))
        return channel
    except BaseException:
        channel.close()
        raise


def _await_line(channel: Channel) -> bytes:
    deadline = time.monotonic() + GREETING_SECONDS
    with selectors.DefaultSelector() as selector:
        selector.register(channel.fileno(), selectors.EVENT_READ)
        while time.monotonic() < deadline:
            selector.select(0.1)
            lines = channel.receive(most=1)  # orders may come in the same breath
            if lines:
                return lines[0]
    raise Closed("nobody answers")
