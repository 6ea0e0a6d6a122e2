"""The way between an agent and the lead: none to speak of where both are in one process.

Knows how words and orders travel; nothing of what they mean.
"""

from launch.lead import Lead
from launch.messages import Hello, Order, Word
from launch.verdict import Verdict


class LeadHere:
    """The lead in this process, with its agents. `agent`: the first rank of the one here."""

    def __init__(self, agent: int) -> None:
        self._agent = agent
        self._orders: list[Order] = []
        self._lead: Lead | None = None

    def appoint(self, lead: Lead, own: Hello) -> None:
        """The lead, and the agent of this process, the first one it knows."""
        self._lead = lead
        lead.welcome(own)

    def post(self, agent: int, order: Order) -> None:
        """What the lead orders."""
        self._orders.append(order)

    @property
    def verdict(self) -> Verdict | None:
        assert self._lead is not None
        return self._lead.verdict

    def say(self, word: Word) -> None:
        assert self._lead is not None
        self._lead.hear(self._agent, word)

    def turn(self) -> list[Order]:
        assert self._lead is not None
        self._lead.tick()
        orders, self._orders = self._orders, []
        return orders

    def close(self) -> None:
        pass
