"""Who does the work of a build: processes of this machine, the ranks of an MPI job, or one part of several.

A task is a module-level function and picklable arguments; its result goes back to the caller, in the order in which
tasks end. Knows nothing of corpora.
"""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor
from concurrent.futures import wait as wait_for_futures
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from gptdist.errors import GptdistError, WorkerFailed

Task = Callable[..., Any]

_HEARTBEAT_SECONDS = 0.2

# One process a core: the libraries below must not start a thread a core in each of them.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class Team(Protocol):
    """Runs tasks. `workers` is how many at a time; `while_waiting` is called now and then while none ends."""

    workers: int
    while_waiting: Callable[[], None]

    def run(self, task: Task, arguments: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """(index, result) of each task as it ends. The first error of a task is raised here."""
        ...

    def close(self) -> None:
        """Let the workers go."""
        ...


class Alone:
    """The calling process does it all."""

    def __init__(self) -> None:
        self.workers = 1
        self.while_waiting = _nothing

    def run(self, task: Task, arguments: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        for index, given in enumerate(arguments):
            yield index, task(*given)

    def close(self) -> None:
        pass


class LocalTeam:
    """Processes of this machine, started at the first task. They end by themselves when the caller dies.

    Not a ProcessPoolExecutor: its workers wait for ever for a caller that was killed.
    """

    def __init__(self, workers: int, preload: Sequence[str] = ()) -> None:
        self.workers = workers
        self.while_waiting = _nothing
        self._preload = list(preload)
        self._members: dict[Connection, multiprocessing.process.BaseProcess] = {}

    def run(self, task: Task, arguments: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        if not arguments:
            return
        self._start()
        waiting = deque(enumerate(arguments))
        busy: dict[Connection, int] = {}
        idle = list(self._members)
        while waiting or busy:
            while waiting and idle:
                member = idle.pop()
                index, given = waiting.popleft()
                busy[member] = index
                self._ask(member, task, given)
            answers = wait(list(busy), _HEARTBEAT_SECONDS)
            self.while_waiting()
            for ready in answers:
                assert isinstance(ready, Connection)
                index = busy.pop(ready)
                idle.append(ready)
                yield index, self._answer(ready, task)

    def close(self) -> None:
        for connection, process in self._members.items():
            connection.close()
            process.terminate()
        for process in self._members.values():
            process.join()
        self._members.clear()

    def prepare(self) -> None:
        """Begin to load what workers need, meanwhile; otherwise that happens at the first task."""
        multiprocessing.get_context("forkserver").set_forkserver_preload(["data_tools.building.team", *self._preload])
        before = {name: os.environ.get(name) for name in _ONE_THREAD}
        os.environ.update(_ONE_THREAD)  # the fork server hands them on
        try:
            forkserver.ensure_running()
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value

    def _start(self) -> None:
        if self._members:
            return
        self.prepare()
        context = multiprocessing.get_context("forkserver")
        for _ in range(self.workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, list(sys.path)), daemon=True)
            process.start()
            theirs.close()
            self._members[ours] = process

    def _ask(self, member: Connection, task: Task, given: tuple[Any, ...]) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # its end is noticed when the answer is read
            member.send((task, given))

    def _answer(self, member: Connection, task: Task) -> Any:
        try:
            good, value = member.recv()
        except (EOFError, ConnectionResetError):
            process = self._members[member]
            process.join()
            raise WorkerFailed(_lost(task, process.exitcode)) from None
        if good:
            return value
        raise value


class ExecutorTeam:
    """Tasks handed to a `concurrent.futures` executor, such as that of mpi4py over the ranks of a job."""

    def __init__(self, executor: Executor, workers: int) -> None:
        self.workers = workers
        self.while_waiting = _nothing
        self._executor = executor

    def run(self, task: Task, arguments: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        futures = {self._executor.submit(guarded, task, given): index for index, given in enumerate(arguments)}
        try:
            left = set(futures)
            while left:
                done, left = wait_for_futures(left, _HEARTBEAT_SECONDS, FIRST_COMPLETED)
                self.while_waiting()
                for future in done:
                    good, value = future.result()
                    if not good:
                        raise value
                    yield futures[future], value
        except BrokenProcessPool as error:
            raise WorkerFailed(_lost(task, None)) from error
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        pass


def _nothing() -> None:
    pass


def guarded(task: Task, given: tuple[Any, ...]) -> tuple[bool, Any]:
    """(True, result), or (False, an error that can cross to another process)."""
    try:
        return True, task(*given)
    except (GptdistError, OSError) as error:
        return False, error
    except Exception:
        return False, WorkerFailed(f"A worker failed in {task.__name__}:\n{traceback.format_exc()}")


def _serve(connection: Connection, path: list[str]) -> None:
    """A worker: takes tasks until the other end of the pipe is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the caller, which lets the workers go
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # At once and not after its task: the next build of the folder may be another one.
    threading.Thread(target=_end_with_the_caller, daemon=True).start()
    sys.path[:] = path
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            task, given = connection.recv()
            connection.send(guarded(task, given))
    os._exit(0)  # the caller has gone: nothing is left to be said or flushed


def _end_with_the_caller() -> None:
    caller = multiprocessing.parent_process()
    if caller is not None:
        caller.join()
        os._exit(1)


def _lost(task: Task, exit_code: int | None) -> str:
    how = f"was killed by signal {-exit_code}" if exit_code is not None and exit_code < 0 else "died"
    if exit_code == -signal.SIGKILL:
        how += " (out of memory, perhaps: try fewer --workers)"
    return f"A worker {how} in {task.__name__}. Finished work is kept; run the same command to go on."
