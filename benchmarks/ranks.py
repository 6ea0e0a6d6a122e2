"""Processes for benchmarks: spawned once, they meet in one process group after the other, of any number of them.

Knows torch.distributed; must not know what is measured. Sockets stay on the loopback interface. Ranks that a group does
not need wait for the next one without using the CPU.
"""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from gptdist.world import World

_LONGEST_WAIT = timedelta(hours=2)  # for ranks that sit out while others are measured


@dataclass(frozen=True)
class Meeting:
    """What a process needs to join groups. `name` of a group must be new, and the same on all ranks."""

    global_rank: int
    processes: int
    store: dist.Store

    @contextmanager
    def group(self, name: str, world_size: int) -> Iterator[World | None]:
        """The first `world_size` processes as one group, NCCL where there are GPUs, else gloo. None: not needed."""
        if self.global_rank >= world_size:
            yield None
            return
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(self.global_rank)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=dist.PrefixStore(name, self.store),
            rank=self.global_rank,
            world_size=world_size,
            timeout=_LONGEST_WAIT,
        )
        try:
            yield World(self.global_rank, world_size, self.global_rank, world_size)
        finally:
            from deepspeed.utils import groups

            dist.destroy_process_group()
            groups._release_process_group_references()  # it caches groups by module, and would use dead ones
            gc.collect()


def run_ranks(function: Callable[..., Any], processes: int, *args: Any) -> Any:
    """`function(meeting, *args)` in `processes` fresh processes, one thread each on a CPU; what the first one returned.

    Raises torch.multiprocessing.ProcessRaisedException with the traceback of the first to fail; the others are ended.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_rank, (processes, store.port, results, function, args), nprocs=processes)
    return results.get()


def _rank(
    global_rank: int, processes: int, port: int, results: Any, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=_LONGEST_WAIT)
    answer = function(Meeting(global_rank, processes, store), *args)
    if global_rank == 0:
        results.put(answer)
