"""The rank's side of a local launch: what a freshly forked process does before, around and after its target.

It dies with its launcher, writes where it is told, and reports the exception that ended it as JSON. Knows nothing of
the other ranks.
"""

import atexit
import ctypes
import faulthandler
import importlib
import io
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from gptdist.errors import EXIT_DONE, EXIT_FAILED, EXIT_RESUMABLE, GptdistError, NodeUnfit
from gptdist.world import World
from launch.ranks.stacks import answer_stacks
from launch.ranks.verdict import Report

Target = Callable[[World, Any], int | None]
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

_PR_SET_PDEATHSIG = 1
_LONGEST_TRACEBACK = 40_000
_LOST_PEER = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "gloo/transport",
    "nccl error",
    "nccl communicator was aborted",
    "process group watchdog",
)


@dataclass(frozen=True)
class RankFiles:
    """File descriptors a rank gets from its launcher: where to report, where to write its stacks when asked, and what
    becomes its stdout and stderr (None: the launcher's own)."""

    report: int
    pad: int
    streams: tuple[int, int] | None


def run_as_rank(
    target: str | Target, payload: Any, world: World, launcher_pid: int, files: RankFiles, threads: int | None
) -> NoReturn:
    """Run `target(world, payload)` and leave the process with its exit code; never returns into the launcher's code.

    `threads`: for torch's own work; None leaves that to torch.
    """
    code = EXIT_FAILED
    try:
        _die_with(launcher_pid)
        _settle_signals()
        _settle_streams(files.streams)
        answer_stacks(files.pad)
        if "torch" in sys.modules and threads is not None:
            sys.modules["torch"].set_num_threads(threads)
        atexit._clear()  # what the launcher registered is the launcher's to run
        outcome = load_target(target)(world, payload)
        code = EXIT_DONE if outcome is None else int(outcome)
        if code in (EXIT_DONE, EXIT_RESUMABLE):
            _finish()
    except BaseException as error:
        code = _report(error, files.report)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code & 0xFF)


def load_target(target: str | Target) -> Target:
    """The function that `module:function` names, or the function itself."""
    if not isinstance(target, str):
        return target
    module, _, function = target.partition(":")
    found: Target = getattr(importlib.import_module(module), function)
    return found


def _die_with(launcher_pid: int) -> None:
    """Ask Linux for SIGKILL when the launcher goes, then look whether it went before we asked."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != launcher_pid:
        os._exit(EXIT_FAILED)


def _settle_signals() -> None:
    """The launcher's handlers are not ours. It alone answers Ctrl-C, which a terminal sends to every process."""
    signal.set_wakeup_fd(-1)
    for number in (*FORWARDED, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _settle_streams(streams: tuple[int, int] | None) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    if streams is not None:
        for number, fd in zip((1, 2), streams, strict=True):
            os.dup2(fd, number)
            os.close(fd)
    # By line even into a pipe, so that a log file follows the run; afresh, as a test may have replaced sys.stdout.
    sys.stdout, sys.stderr = _open_text(1), _open_text(2)
    faulthandler.enable(file=2)


def _open_text(fd: int) -> io.TextIOWrapper:
    raw = io.BufferedWriter(io.FileIO(fd, "w", closefd=False))
    return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", line_buffering=True)


def _finish() -> None:
    """What the interpreter would do at a normal end: wait for writers, run exit functions."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()


def _report(error: BaseException, report_fd: int) -> int:
    """Tell the launcher why this rank ends; returns the exit code. Nothing here may raise."""
    exit_code = error.exit_code if isinstance(error, GptdistError) else EXIT_FAILED
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        return error.code or EXIT_DONE
    here = error.__traceback__.tb_next if error.__traceback__ else None  # without run_as_rank's own frame
    text = "".join(traceback.format_exception(type(error), error, here))
    report = Report(
        kind=type(error).__name__,
        message=str(error),
        traceback=text[-_LONGEST_TRACEBACK:],
        exit_code=exit_code,
        deliberate=isinstance(error, GptdistError | SystemExit),
        echo=_is_echo(error),
        at_nanoseconds=time.monotonic_ns(),
        unfit=error.hosts if isinstance(error, NodeUnfit) else (),
    )
    try:
        with open(report_fd, "wb") as pipe:
            pipe.write(json.dumps(asdict(report)).encode())
    except OSError:
        print(text, file=sys.stderr)
    return exit_code


def _is_echo(error: BaseException) -> bool:
    """Whether this only says that another rank failed: an agreed error of theirs, or a collective that lost its
    peer."""
    message = str(error).lower()
    if isinstance(error, GptdistError):
        return message.startswith("[rank ")
    if any(kind.__name__ == "DistError" for kind in type(error).__mro__) or isinstance(error, ConnectionError):
        return True
    return isinstance(error, RuntimeError) and any(words in message for words in _LOST_PEER)
