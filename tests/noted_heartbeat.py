"""A heartbeat that remembers all it was told, for tests of who tells it. Knows no ranks."""

import os

from gptdist.monitor.heartbeat import Heartbeat, Pulse, create_memory


class NotedHeartbeat(Heartbeat):
    """Every phase, and every collective; None: out of it again. What a reader sees is `pulse`'s; `fd` is the memory."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.collectives: list[str | None] = []
        self.inside: set[tuple[str, str]] = set()  # (phase, collective)
        self.fd = create_memory()
        self.pulse = Pulse(self.fd)
        super().__init__(Heartbeat.open(self.fd)._memory)
        self.collectives.clear()

    def __del__(self) -> None:
        os.close(self.fd)

    def collective(self, name: str | None) -> None:
        self.collectives.append(name)
        if name is not None:
            self.inside.add((self.phases[-1] if self.phases else "starting", name))
        super().collective(name)

    def phase(self, name: str) -> None:
        self.phases.append(name)
        super().phase(name)
