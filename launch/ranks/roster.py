"""The agents of a run, as its lead knows them: which ranks are whose, on which host, and who is gone."""

from collections.abc import Iterator
from dataclasses import dataclass

from launch.ranks.messages import Hello


@dataclass
class Agent:
    """One agent; it is known by its first rank. `lost`: it is gone, and its ranks with it."""

    hello: Hello
    lost: bool = False

    @property
    def ranks(self) -> range:
        return range(self.hello.first_rank, self.hello.first_rank + self.hello.ranks)

    @property
    def host(self) -> str:
        return self.hello.host


class Roster:
    """Agents that came, of a run of `world_size` ranks."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._agents: dict[int, Agent] = {}
        self._of_rank: dict[int, Agent] = {}

    def add(self, hello: Hello) -> str | None:
        """An agent that has come; or why it cannot be one of ours."""
        agent = Agent(hello)
        if agent.ranks.stop > self._world_size:
            return f"ranks up to {agent.ranks.stop - 1} of {self._world_size}"
        for rank in agent.ranks:
            if rank in self._of_rank:
                return f"rank {rank} already came from {self.host_of(rank)}"
        self._agents[hello.first_rank] = agent
        self._of_rank.update(dict.fromkeys(agent.ranks, agent))
        return None

    def forget(self, first_rank: int) -> None:
        """It has gone before anything began, and may come again."""
        for rank in self._agents.pop(first_rank).ranks:
            del self._of_rank[rank]

    def __getitem__(self, first_rank: int) -> Agent:
        return self._agents[first_rank]

    def present(self) -> Iterator[int]:
        """First ranks of the agents that are there."""
        return (first_rank for first_rank, agent in self._agents.items() if not agent.lost)

    def absent(self) -> list[int]:
        """Ranks whose agents have not come."""
        return [rank for rank in range(self._world_size) if rank not in self._of_rank]

    def reachable(self) -> Iterator[int]:
        """Ranks whose agents are there; once all have come."""
        return (rank for rank in range(self._world_size) if not self._of_rank[rank].lost)

    def agent_of(self, rank: int) -> Agent:
        return self._of_rank[rank]

    def host_of(self, rank: int) -> str:
        return self._of_rank[rank].host

    def hosts(self) -> list[str]:
        """Of all agents, in the order of their ranks."""
        return [self._agents[first_rank].host for first_rank in sorted(self._agents)]
