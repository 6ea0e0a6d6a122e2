"""Ranks as threads of one process, for what only needs control messages."""

import json
import threading

from gptdist.comms import Comms
from gptdist.world import World


class ThreadComms(Comms):
    """Ranks as threads of one process: what Comms gathers over gloo is passed through a list, as JSON."""

    def __init__(self, world, meeting, slots):
        self.world = world
        self._meeting = meeting
        self._slots = slots

    def _gather(self, value):
        self._slots[self.world.global_rank] = json.dumps(value)
        self._meeting.wait()
        values = [json.loads(slot) for slot in self._slots]
        self._meeting.wait()
        return values

    def _broadcast(self, value):
        return self._gather(value)[0]

    def barrier(self):
        with self._noting_breaks():
            self._meeting.wait()


def on_ranks(world_size, work):
    """work(comms) on every rank; each one's result, or the exception it raised."""
    meeting, slots, results = threading.Barrier(world_size, timeout=20), [None] * world_size, [None] * world_size

    def run(global_rank):
        comms = ThreadComms(World(global_rank=global_rank, world_size=world_size), meeting, slots)
        try:
            results[global_rank] = work(comms)
        except Exception as error:
            results[global_rank] = error

    threads = [threading.Thread(target=run, args=(global_rank,)) for global_rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
