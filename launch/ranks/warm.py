"""What a process makes ready before it forks ranks: the environment libraries read, imports, signals to catch.

Knows nothing of ranks or runs. All of it is undone, but for the imports.
"""

import gc
import importlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType

from gptdist.errors import LaunchError
from launch.ranks.forked_rank import FORWARDED

ENGINES = ("gptdist.engine.engine",)
"""What a training rank imports; seconds, so imported once, before the fork."""


class Stopped(BaseException):
    """A signal came before there were ranks to pass it on to."""

    def __init__(self, number: int) -> None:
        self.number = number


@dataclass
class Signals:
    """Signals that arrived. `wakeup_fds` are the two ends of a pipe, readable after each. While `raises`, there are no
    ranks yet and the launch is simply given up."""

    wakeup_fds: tuple[int, int]
    pending: list[int] = field(default_factory=list)
    raises: bool = True

    def note(self, number: int, frame: FrameType | None) -> None:
        self.pending.append(number)
        if self.raises:
            raise Stopped(number)

    def taken(self) -> list[int]:
        """Those that were not taken yet."""
        numbers = []
        while self.pending:
            numbers.append(self.pending.pop(0))
        return numbers


def available_cores() -> int:
    """Cores this process may use (a container or Slurm may allow fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of_a_rank(env: Mapping[str, str], local_ranks: int, local_world_size: int) -> int | None:
    """Threads for each of `local_ranks` started here, of `local_world_size` on this machine; None: as torch likes.

    An outer launcher may have given each of its tasks cores of its own.
    """
    asked = env.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    if local_world_size == 1:
        return None
    cores = available_cores()
    shared_by = local_ranks if cores < (os.cpu_count() or 1) else local_world_size
    return max(1, cores // shared_by)


@contextmanager
def environment(threads: int | None) -> Iterator[None]:
    """Set what libraries read once, when imported; as it was afterwards."""
    # Asking for GPUs must not initialise CUDA, which does not survive a fork.
    wanted = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    if threads is not None:
        wanted["OMP_NUM_THREADS"] = str(threads)
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
def catch_signals() -> Iterator[Signals]:
    """Note the signals to pass on, and wake the agent at each, and at each end or stop of a rank."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    signals = Signals((read, write))
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


def preload(modules: Sequence[str]) -> None:
    """Import them, once for all ranks; those that fail are left to the ranks. Raises LaunchError."""
    collecting = gc.isenabled()
    gc.disable()  # a fifth of the time of these imports goes into looking at what they leave
    try:
        for module in modules:
            with suppress(Exception):  # a rank that needs it will say so, with its own traceback
                importlib.import_module(module)
    finally:
        if collecting:
            gc.enable()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise LaunchError(
            "CUDA was initialised while modules were imported, so ranks cannot be forked from this process. Start "
            "them with `torchrun --nproc-per-node N -m launch.cli train CONFIG` instead of --nproc."
        )
