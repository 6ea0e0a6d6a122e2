"""Where a rank is in its Python code: asked by a signal, answered without the interpreter, read within a bounded time.

The rank's side is one call at its start; from then on a rank that hangs in native code, or holds the GIL for ever,
answers too. Of a rank that does not, this file finds out why not. Knows processes, /proc and py-spy, and nothing of
training; on what grounds a rank is asked is the caller's.
"""

import contextlib
import faulthandler
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

STACK_SIGNAL = signal.SIGRTMIN + 1
"""Nobody else's: libc keeps those below SIGRTMIN, launchers and Slurm send none of the real-time ones. Where it is not
handled it ends the process, so it is never sent to one that does not handle it."""

ANSWER_SECONDS = 1.0
PY_SPY_SECONDS = 3.0
_SETTLED_SECONDS = 0.05  # an answer that has not grown for so long is whole
_POLL_SECONDS = 0.01
_THREAD = re.compile(r"(?:Current thread|Thread) 0x([0-9a-f]+).*\(most recent call first\):")
_FRAME = re.compile(r'  File "(.*)", line (\d+|\?\?\?) in (.*)')
_OWN_WRAPPERS = ("gptdist/engine/clock.py",)
_STATES = {
    "T": "it is stopped (SIGSTOP, or a debugger)",
    "t": "it is stopped by a debugger",
    "Z": "it has ended",
    "X": "it has ended",
}


@dataclass(frozen=True)
class Frame:
    """A call: `line` is where in `file` it is now; 0: unknown."""

    file: str
    line: int
    function: str


@dataclass(frozen=True)
class ThreadStack:
    """The calls a thread is in, innermost first."""

    thread: str
    frames: tuple[Frame, ...]


@dataclass(frozen=True)
class RankStacks:
    """A rank's threads, its main thread first; or, where there are none, why it is `silent`."""

    threads: tuple[ThreadStack, ...]
    silent: str | None = None

    @property
    def waits_in(self) -> str | None:
        """The collective that its main thread is in, by torch's name for it; None: in none."""
        return collective_of(self.threads[0].frames) if self.threads else None


# -- the rank's side ---------------------------------------------------------------------------------------------------


def create_pad() -> int:
    """A file descriptor for one rank to write its stacks to, never full and never waiting. The caller closes it."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("gptdist-stacks")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    # Each answer goes to the end, which is the beginning once the last one was read.
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_APPEND)
    return fd


def answer_stacks(pad: int) -> None:
    """From now on this process answers STACK_SIGNAL by writing all its threads' stacks to `pad`."""
    faulthandler.register(STACK_SIGNAL, file=pad, all_threads=True)


# -- the asking side ---------------------------------------------------------------------------------------------------


def ask_stacks(pads: Mapping[int, int], seconds: float = ANSWER_SECONDS) -> dict[int, RankStacks]:
    """The stacks of processes, all asked at once: by process id, each with its pad, to what it answered.

    Returns within `seconds`, and PY_SPY_SECONDS more where some do not answer and py-spy is installed.
    """
    asked = {pid: pad for pid, pad in pads.items() if _ask(pid, pad)}
    answers = _await_answers(asked, time.monotonic() + seconds)
    found = {pid: RankStacks(threads) for pid, threads in answers.items() if threads}
    silent = [pid for pid in pads if pid not in found]
    spied = _spy(silent)
    for pid in silent:
        found[pid] = RankStacks(spied.get(pid, ()), why_silent(pid, seconds))
    return {pid: found[pid] for pid in pads}


def is_stopped(pid: int) -> bool:
    """Whether the process was stopped, as by SIGSTOP."""
    return _state(pid) in ("T", "t")


def why_silent(pid: int, seconds: float) -> str:
    """Why a process that was asked has not answered within `seconds`, as far as the system tells."""
    state = _state(pid)
    if not state:
        return "it has ended"
    if state in _STATES:
        return _STATES[state]
    if not _handles(pid):
        return "it has only just been started, and does not answer yet"
    where = f" ({place})" if (place := _kernel_function(pid)) else ""
    if state == "D":
        return f"it is stuck in the kernel{where}: a disk, a network file system or a device that does not answer"
    doing = "busy" if state == "R" else "waiting"
    return f"it did not answer within {seconds:g} s; it is {doing} in native code{where}"


def collective_of(frames: Sequence[Frame]) -> str | None:
    """The collective that a thread is in: the innermost function of torch.distributed; or who waits for a handle."""
    waiting = bool(frames) and frames[0].file.endswith(_OWN_WRAPPERS)
    for frame in frames:
        if frame.file.endswith(_OWN_WRAPPERS):
            continue
        if frame.file.endswith("torch/distributed/distributed_c10d.py"):
            return frame.function
        if waiting:
            return f"the wait of {frame.function} ({os.path.basename(frame.file)}:{frame.line})"
        return None
    return None


def parse_stacks(text: str) -> tuple[ThreadStack, ...]:
    """What faulthandler wrote, the main thread first: it lists threads from the youngest to the oldest."""
    threads: list[ThreadStack] = []
    for line in text.splitlines():
        if header := _THREAD.fullmatch(line):
            threads.append(ThreadStack(header[1], ()))
        elif threads and (match := _FRAME.fullmatch(line)):
            frame = Frame(match[1], int(match[2]) if match[2].isdigit() else 0, match[3])
            threads[-1] = ThreadStack(threads[-1].thread, (*threads[-1].frames, frame))
    return tuple(reversed(threads))


def render_stacks(stacks: RankStacks, most_frames: int = 12) -> str:
    """Lines for a report: the main thread's innermost calls, the last one where it is now."""
    lines = [stacks.silent] if stacks.silent else []
    if stacks.threads:
        frames = stacks.threads[0].frames
        lines += [f"... {len(frames) - most_frames} calls above"] if len(frames) > most_frames else []
        lines += [f"{frame.file}:{frame.line} in {frame.function}" for frame in reversed(frames[:most_frames])]
    return "\n".join(lines)


def _ask(pid: int, pad: int) -> bool:
    os.ftruncate(pad, 0)
    if not _handles(pid):
        return False
    try:
        os.kill(pid, STACK_SIGNAL)
    except ProcessLookupError:
        return False
    return True


def _await_answers(pads: Mapping[int, int], deadline: float) -> dict[int, tuple[ThreadStack, ...]]:
    sizes = dict.fromkeys(pads, 0)
    grown = dict.fromkeys(pads, time.monotonic())
    open_pads = set(pads)
    while open_pads and (now := time.monotonic()) < deadline:
        for pid in tuple(open_pads):
            size = os.fstat(pads[pid]).st_size
            if size != sizes[pid]:
                sizes[pid], grown[pid] = size, now
            elif size and now - grown[pid] > _SETTLED_SECONDS:
                open_pads.discard(pid)
        time.sleep(_POLL_SECONDS)
    return {pid: parse_stacks(os.pread(pad, 1 << 20, 0).decode(errors="replace")) for pid, pad in pads.items()}


def _spy(pids: Sequence[int]) -> dict[int, tuple[ThreadStack, ...]]:
    """What py-spy, where it is installed, sees from outside; it needs the right to trace them."""
    program = shutil.which("py-spy")
    if program is None:
        return {}
    running = {pid: _start_spy(program, pid) for pid in pids}
    deadline = time.monotonic() + PY_SPY_SECONDS
    found = {}
    for pid, spy in running.items():
        try:
            output, _ = spy.communicate(timeout=max(0.0, deadline - time.monotonic()))
            found[pid] = _parse_spied(output)
        except (subprocess.TimeoutExpired, ValueError, KeyError, TypeError):
            spy.kill()
            spy.communicate()
    return found


def _start_spy(program: str, pid: int) -> subprocess.Popen[bytes]:
    command = [program, "dump", "--nonblocking", "--json", "--pid", str(pid)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def _parse_spied(output: bytes) -> tuple[ThreadStack, ...]:
    threads = sorted(json.loads(output), key=lambda thread: thread["os_thread_id"] != thread["pid"])
    return tuple(
        ThreadStack(
            f"{thread['thread_id']:x}",
            tuple(Frame(frame["filename"], int(frame["line"]), frame["name"]) for frame in thread["frames"]),
        )
        for thread in threads
    )


def _handles(pid: int) -> bool:
    """Whether the process has a handler for STACK_SIGNAL."""
    caught = _status(pid).get("SigCgt")
    return caught is None or bool(int(caught, 16) >> (STACK_SIGNAL - 1) & 1)


def _status(pid: int) -> dict[str, str]:
    with contextlib.suppress(OSError):
        pairs = (line.partition(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return {name: value.strip() for name, _, value in pairs}
    return {}


def _state(pid: int) -> str:
    """Linux's letter for what the process does; empty where there is no such process."""
    return _status(pid).get("State", "")[:1]


def _kernel_function(pid: int) -> str:
    """Where in the kernel its main thread waits; empty where that is not known."""
    with contextlib.suppress(OSError):
        place = Path(f"/proc/{pid}/wchan").read_text().strip()
        return "" if place == "0" else place
    return ""
