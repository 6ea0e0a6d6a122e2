"""A pool of rank processes that all distributed tests share: importing the engine costs seconds, so it happens once.

The ranks are forked from the fork server (fork_server.py), which has imported the engine and runs nothing else. Each
`run` gives the first ranks a fresh gloo group on the loopback interface and takes it down again. Knows nothing of
models.
"""

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

from gptdist.world import World
from tests.dist.fork_server import check_forked, fork_server

MOST_RANKS = 8
MOST_THREADS = 20
# What a rank says when another one left it alone: never the first error.
_LOST_PEER = ("connection closed by peer", "connection reset by peer", "broken pipe", "gloo", "timed out")
_GRACE_SECONDS = 5.0  # for the error of the rank that failed first to arrive


class RankError(AssertionError):
    """A function failed on a rank; the message holds that rank's traceback."""


@dataclass(frozen=True)
class _Failure:
    text: str
    lost_peer: bool


class RankPool:
    """Up to eight processes that stay; `run` is the only thing to do with them."""

    def __init__(self) -> None:
        self._ranks: list[tuple[BaseProcess, Connection]] = []

    def run(
        self, function: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 240.0
    ) -> list[Any]:
        """`function(world, *args)` on `world_size` ranks; what each returned, by global rank.

        `function` is found by its module and name. Raises RankError with the first failing rank's traceback, or
        TimeoutError after `timeout_seconds`; either way the ranks are ended, and the next run has new ones.
        """
        self._start(world_size)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ranks = self._ranks[:world_size]
        try:
            for global_rank, (_, pipe) in enumerate(ranks):
                world = World(global_rank, world_size, global_rank, world_size, master_port=store.port)
                pipe.send((function, world, args))
            results, worn_out = self._collect([pipe for _, pipe in ranks], timeout_seconds)
            if worn_out:
                self.close()
        except BaseException as error:
            self.close(show_stacks=isinstance(error, TimeoutError))
            raise
        finally:
            del store
        return results

    def close(self, show_stacks: bool = False) -> None:
        """End the rank processes. `show_stacks`: each first writes to stderr where it stands."""
        ranks, self._ranks = self._ranks, []
        if show_stacks:
            for process, _ in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid or 0, signal.SIGUSR1)
            time.sleep(0.5)
        for process, pipe in ranks:
            pipe.close()
            process.kill()
        for process, _ in ranks:
            process.join()

    def _start(self, world_size: int) -> None:
        if not 1 <= world_size <= MOST_RANKS:
            raise ValueError(f"a pool has 1 to {MOST_RANKS} ranks, not {world_size}")
        if any(not process.is_alive() for process, _ in self._ranks):
            self.close()
        context = fork_server()
        while len(self._ranks) < world_size:
            ours, theirs = context.Pipe()
            name = f"rank-{len(self._ranks)}"
            process = context.Process(target=_serve, args=(theirs,), name=name, daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def _collect(self, pipes: list[Connection], timeout_seconds: float) -> tuple[list[Any], bool]:
        results: dict[int, Any] = {}
        worn_out = False
        failures: dict[int, _Failure] = {}
        deadline = time.monotonic() + timeout_seconds
        while len(results) < len(pipes):
            waiting = [pipe for number, pipe in enumerate(pipes) if number not in results and number not in failures]
            ready = connection.wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready and not failures:
                stuck = [number for number, pipe in enumerate(pipes) if pipe in waiting]
                raise TimeoutError(f"ranks {stuck} of {len(pipes)} did not answer in {timeout_seconds:.0f} s")
            for pipe in ready:
                number = pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    failed, answer, worn = pipes[number].recv()
                except (EOFError, ConnectionResetError):
                    failed, answer, worn = True, _Failure("the process ended", lost_peer=False), True
                worn_out |= worn
                (failures if failed else results)[number] = answer
            if failures:
                _raise_first(failures, give_up=not ready)
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        return [results[number] for number in range(len(pipes))], worn_out


def _raise_first(failures: dict[int, _Failure], give_up: bool) -> None:
    """Raise the first error that is a rank's own; the loss of a peer only when no other error came."""
    own = [number for number, failure in failures.items() if not failure.lost_peer]
    if own or give_up:
        first = own[0] if own else next(iter(failures))
        raise RankError(f"rank {first} failed:\n{failures[first].text}")


def _serve(pipe: Connection) -> None:
    """A rank's life: one function after the other, until the pool closes the pipe or dies."""
    check_forked()
    threading.Thread(target=_end_with_pytest, daemon=True).start()
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    while True:
        try:
            function, world, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = (False, _run_in_group(function, world, args))
        except BaseException as error:
            text = traceback.format_exc()
            lost_peer = any(words in str(error).lower() for words in _LOST_PEER)
            answer = (True, _Failure(text, lost_peer))
        del function, args
        # An engine that something keeps alive keeps gloo's threads, which slow down all that follows.
        worn_out = len(os.listdir("/proc/self/task")) > MOST_THREADS
        pipe.send((*answer, worn_out))


def _end_with_pytest() -> None:
    """A busy rank must end too, and the fork server, whose child it is, outlives pytest as long as a rank does."""
    pytest_process = multiprocessing.parent_process()
    if pytest_process is not None:
        connection.wait([pytest_process.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)


def _run_in_group(function: Callable[..., Any], world: World, args: tuple[Any, ...]) -> Any:
    store = dist.TCPStore(world.master_address, world.master_port, world.world_size + 1, is_master=False)
    dist.init_process_group("gloo", store=store, rank=world.global_rank, world_size=world.world_size)
    try:
        dist.barrier()  # no rank may leave while another still connects,
        result = function(world, *args)
        dist.barrier()  # or still reads what was sent to it
        return result
    finally:
        _forget_groups()


def _forget_groups() -> None:
    from deepspeed.utils import groups

    dist.destroy_process_group()
    groups._release_process_group_references()  # it caches groups by module, and would use dead ones
    gc.collect()  # engines are full of cycles; a few hundred of them would fill the memory
