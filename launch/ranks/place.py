"""Where an agent and its ranks stand among all of a run, and the allocation they are in. Pure."""

import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gptdist.world import World

if TYPE_CHECKING:
    from launch.ranks.messages import Start


@dataclass(frozen=True)
class Allocation:
    """What the run was started in: `name`, `slurm 123` or `local`, and how often it was requeued. `can_requeue`: a
    scheduler starts it again where its exit code asks for that."""

    name: str = "local"
    restart: int = 0
    can_requeue: bool = False


@dataclass(frozen=True)
class Place:
    """Where an agent stands among the agents of a run.

    It starts the global ranks from `first_rank` on, `local_ranks` of them, the first of which is `first_local_rank` of
    its machine's `local_world_size`; `host` is that machine, by the name its scheduler knows where there is one.
    `lead_ports` on `lead_host`: where the lead may listen; none where this is the only agent. `identity` is what makes
    one start of one run different from all others; `key_file` holds a secret that only its user knows, where there is
    one.
    """

    world_size: int = 1
    first_rank: int = 0
    local_ranks: int = 1
    first_local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    launcher: str = "local"
    lead_host: str = "127.0.0.1"
    lead_ports: tuple[int, ...] = ()
    identity: str = ""
    key_file: Path | None = None
    host: str = field(default_factory=socket.gethostname)

    @classmethod
    def alone(cls, nproc: int) -> "Place":
        """All ranks of the run are here."""
        return cls(world_size=nproc, local_ranks=nproc, local_world_size=nproc)

    @property
    def leads(self) -> bool:
        """Whether the lead is in this process."""
        return self.first_rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is no other agent."""
        return self.local_ranks == self.world_size

    @property
    def is_one_node(self) -> bool:
        return self.local_world_size == self.world_size

    def world(self, index: int, start: "Start", listen_fd: int) -> World:
        """Of the `index`-th of its ranks."""
        return World(
            global_rank=self.first_rank + index,
            world_size=self.world_size,
            local_rank=self.first_local_rank + index,
            local_world_size=self.local_world_size,
            node_rank=self.node_rank,
            master_address=start.master_address,
            master_port=start.master_port,
            launcher=self.launcher,
            listen_fd=listen_fd,
            generation=start.generation,
            host=self.host,
        )
