"""multiprocessing's fork server, running with everything imported: what ranks and commands of the tests come from.

A process has but one such server, and building a corpus in pytest's own process starts it too, without the engine: then
every rank and every command would import that anew, seconds each. So ours is started first, or takes its place.
"""

import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_started: list[int] = []  # its process


def fork_server() -> ForkServerContext:
    """The context whose processes are forked from it."""
    server = forkserver._forkserver  # type: ignore[attr-defined]
    if server._forkserver_pid is not None and server._forkserver_pid not in _started:
        server._stop()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.dist.preloaded"])
    with _environment():
        forkserver.ensure_running()
    _started[:] = [server._forkserver_pid]
    return context


def check_forked() -> None:
    """In a process of that context: nothing is to be imported here. Forks of another server do not pass."""
    preloaded = sys.modules.get("tests.dist.preloaded")
    if preloaded is None or os.getppid() != preloaded.LOADED_BY:
        raise RuntimeError("this process was forked before tests/dist/preloaded.py was imported")


@contextmanager
def _environment() -> Iterator[None]:
    """It imports what it preloads by PYTHONPATH, whatever sys.path is here; a thread would not survive its forks."""
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    wanted = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
