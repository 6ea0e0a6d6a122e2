"""Where this process stands among the processes of a run: one frozen value, made by `launch/rendezvous.py`.

Knows no launcher and reads no environment variable; the library is handed a `World`.
"""

import socket
from dataclasses import dataclass, field


@dataclass(frozen=True)
class World:
    """One rank's place. `local_rank` counts within the node; `master_address:master_port` is where ranks meet.

    `listen_fd`: on the first rank, a socket that already listens there (so that no one else can take the port between
    choosing it and using it); -1 where there is none yet. `heartbeat_fd`: memory for this rank's signs of life
    (`gptdist.monitor.heartbeat`); -1 where nobody reads them. `generation`: how often ranks were restarted in place.
    `host`: the machine, by the name its scheduler knows where there is one.
    """

    global_rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    master_address: str = "127.0.0.1"
    master_port: int = 0
    launcher: str = "single"
    listen_fd: int = -1
    heartbeat_fd: int = -1
    generation: int = 0
    host: str = field(default_factory=socket.gethostname)

    @property
    def is_one_node(self) -> bool:
        """Whether every rank runs on this machine, so that no socket needs to leave the loopback interface."""
        return self.local_world_size == self.world_size

    @property
    def is_first(self) -> bool:
        """Whether this is global rank 0, the one that prints and writes what is written once."""
        return self.global_rank == 0
