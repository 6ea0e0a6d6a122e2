"""Ranks on this machine: forked from one process that has imported the heavy things once, watched, and ended together.

The launcher is the ranks' parent and does nothing but start them, relay output, pass on signals and wait (`watch.py`).
It knows nothing of training; what a rank runs is given.
"""

import gc
import importlib
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from gptdist.errors import EXIT_RESUMABLE, LaunchError
from gptdist.world import World
from launch.forked_rank import FORWARDED, Target, run_as_rank
from launch.relay import LineRelay
from launch.rendezvous import LOOPBACK, open_listener
from launch.verdict import EXIT_INTERRUPTED, Verdict
from launch.watch import RunningRank, Watch, kill_ranks

ENGINES = ("gptdist.engine.engine",)
"""What a training rank imports; seconds, so imported once, before the fork."""


class _Stopped(BaseException):
    """A signal came before there were ranks to pass it on to."""

    def __init__(self, number: int) -> None:
        self.number = number


@dataclass
class _Signals:
    """Signals that arrived. While `raises`, there are no ranks yet and the launch is simply given up."""

    wakeup_fd: int
    pending: list[int] = field(default_factory=list)
    raises: bool = True

    def note(self, number: int, frame: FrameType | None) -> None:
        self.pending.append(number)
        if self.raises:
            raise _Stopped(number)


def launch_local(
    nproc: int,
    target: str | Target,
    payload: Any = None,
    *,
    preload: Sequence[str] = (),
    port: int = 0,
    timeout_seconds: float | None = None,
) -> int:
    """Run `target(world, payload)` on `nproc` forked ranks; returns the exit code of the run, its error shown once.

    The arguments are those of `run_local`.
    """
    verdict = run_local(nproc, target, payload, preload=preload, port=port, timeout_seconds=timeout_seconds)
    for text in (verdict.traceback.rstrip(), f"error: {verdict.message}" if verdict.message else ""):
        if text:
            print(text, file=sys.stderr, flush=True)
    return verdict.exit_code


def run_local(
    nproc: int,
    target: str | Target,
    payload: Any = None,
    *,
    preload: Sequence[str] = (),
    port: int = 0,
    timeout_seconds: float | None = None,
) -> Verdict:
    """Run `target(world, payload)` on `nproc` forked ranks; how the run ended, which is not shown.

    `target`: a function, or `module:function`, imported in the ranks. `payload` needs no serialising. `preload`:
    modules to import before the fork (those that fail are left to the ranks, which then say why). `port`: where the
    ranks meet, 0 for a free one. `timeout_seconds`: end the ranks after this long. Call it from the main thread. Raises
    LaunchError.
    """
    threads = max(1, available_cores() // nproc)
    with _environment(threads), _catch_signals() as signals:
        try:
            with open_listener(LOOPBACK, port) as listener:
                _preload(preload)
                meeting = World(world_size=nproc, local_world_size=nproc, master_port=listener.getsockname()[1])
                ranks = _fork_all(meeting, target, payload, listener.fileno(), threads, signals)
        except _Stopped as stop:
            return Verdict(EXIT_INTERRUPTED if stop.number == signal.SIGINT else EXIT_RESUMABLE)
        try:
            return Watch(ranks, signals.wakeup_fd, signals.pending, timeout_seconds).run()
        finally:
            kill_ranks(ranks)


def available_cores() -> int:
    """Cores this process may use (a container or Slurm may allow fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _environment(threads: int) -> Iterator[None]:
    """Set what libraries read once, when imported; as it was afterwards."""
    wanted = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(threads),
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking for GPUs must not initialise CUDA, which does not survive a fork
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _catch_signals() -> Iterator[_Signals]:
    """Note the signals to pass on, and wake the watch at each, and at each end of a rank."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signals = _Signals(read)
    wakeup_before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    before = {number: signal.signal(number, signals.note) for number in FORWARDED}
    before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda number, frame: None)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup_before)
        os.close(read)
        os.close(write)


def _preload(modules: Sequence[str]) -> None:
    for module in modules:
        with suppress(Exception):  # a rank that needs it will say so, with its own traceback
            importlib.import_module(module)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise LaunchError(
            "CUDA was initialised while modules were imported, so ranks cannot be forked from this process. Start "
            "them with `torchrun --nproc-per-node N -m launch.cli train CONFIG` instead of --nproc."
        )


def _fork_all(
    meeting: World, target: str | Target, payload: Any, listen_fd: int, threads: int, signals: _Signals
) -> list[RunningRank]:
    ranks: list[RunningRank] = []
    gc.collect()
    gc.freeze()  # a collection in one rank must not copy the pages that all share
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # a fresh rank must not run the launcher's handlers
    signals.raises = False
    try:
        if signals.pending:
            raise _Stopped(signals.pending[0])
        for global_rank in range(meeting.world_size):
            ranks.append(_fork_one(_place(meeting, global_rank, listen_fd), target, payload, listen_fd, threads, ranks))
        return ranks
    except BaseException:
        kill_ranks(ranks)
        raise
    finally:
        gc.unfreeze()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _place(meeting: World, global_rank: int, listen_fd: int) -> World:
    return World(
        global_rank=global_rank,
        world_size=meeting.world_size,
        local_rank=global_rank,
        local_world_size=meeting.local_world_size,
        master_address=LOOPBACK,
        master_port=meeting.master_port,
        launcher="local",
        listen_fd=listen_fd if global_rank == 0 else -1,
    )


def _fork_one(
    world: World, target: str | Target, payload: Any, listen_fd: int, threads: int, earlier: list[RunningRank]
) -> RunningRank:
    """Rank 0 keeps the launcher's stdout and stderr, so that a progress bar finds its terminal; others get pipes."""
    report_read, report_write = os.pipe()
    pipes = [] if world.is_first else [os.pipe(), os.pipe()]
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    launcher_pid = os.getpid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12+ warns of threads; none of them holds a lock of ours
        pid = os.fork()
    if pid == 0:
        foreign = [report_read, *(read for read, _ in pipes)]
        foreign += [fd for rank in earlier for fd in (rank.report_fd, *(relay.source_fd for relay in rank.relays))]
        for fd in foreign if world.is_first else [*foreign, listen_fd]:
            os.close(fd)
        streams = (pipes[0][1], pipes[1][1]) if pipes else None
        run_as_rank(target, payload, world, launcher_pid, streams, report_write, threads)
    os.close(report_write)
    relays = []
    for number, (read, write) in enumerate(pipes, start=1):
        os.close(write)
        relays.append(LineRelay(read, number, f"[rank {world.global_rank}] "))
    return RunningRank(world.global_rank, pid, report_read, relays)
