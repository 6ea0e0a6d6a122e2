"""A rank's signs of life in shared memory: where it is, in which collective, and how long its last steps took.

The rank writes without locks and without system calls; whoever holds the same memory reads at any moment, even of a
rank that was killed or stopped in the middle of a write. Knows no processes and no torch, and not what a reader will
conclude.
"""

import mmap
import os
import struct
import tempfile
import time
import zlib
from dataclasses import dataclass

PHASES = (
    "starting",
    "loading",
    "preflight",
    "waiting for data",
    "forward and backward",
    "reducing gradients",
    "optimizer step",
    "logging",
    "evaluating",
    "sampling text",
    "saving",
    "uploading",
    "ending",
)
"""What a rank may be doing."""

COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_to_all",
    "barrier",
    "broadcast",
    "gather",
    "recv",
    "reduce",
    "reduce_scatter",
    "scatter",
    "send",
    "another collective",
)
"""What a rank may wait in for others."""

# A word holds microseconds above eight bits that say what has been so since then: one store, which no reader sees half
# done. Nanoseconds would overflow after a year.
_KIND_BITS = 8
_PHASE_BITS = 4  # the other four: the phase that the ending came from
_PHASE, _COLLECTIVE, _STEP, _SAVED, _STEPS_WRITTEN, _SAVE_MICROSECONDS = range(6)
_HEADER_BYTES = 64
_TIMES = struct.Struct("=qdddddd")
_CHECK = struct.Struct("=I")
_SLOT_BYTES = 64
_SLOTS = 63
_BYTES = _HEADER_BYTES + _SLOTS * _SLOT_BYTES  # a page


@dataclass(frozen=True)
class StepTimes:
    """Where one rank's wall clock went in one step, seconds. `compute` is what is neither wait: forward, backward,
    the optimizer step and the rest."""

    step: int
    seconds: float
    data_wait: float
    compute: float
    collective_wait: float
    forward: float = 0.0
    backward: float = 0.0


@dataclass(frozen=True)
class Beat:
    """What a rank's memory says. Times are of `time.monotonic_ns`, the same clock for all processes of a machine.

    `beat_ns`: when the rank last moved: into a phase, or into or out of a collective. `collective`: the one it is in,
    or on a GPU, where they run by themselves, the one it launched last. `step`: the last one finished. `recent`: the
    last finished ones, oldest first. `save_seconds`: what the last save took until it was durable, 0 before the first.
    `ended_in`: the phase that the ending came from; None before it.
    """

    step: int
    phase: str
    phase_started_ns: int
    beat_ns: int
    saved_step: int | None
    collective: str | None
    recent: tuple[StepTimes, ...]
    save_seconds: float = 0.0
    ended_in: str | None = None


class Heartbeat:
    """The rank's side. Each method takes about a microsecond. All but `saved` belong to the thread that trains."""

    def __init__(self, memory: "mmap.mmap | bytearray") -> None:
        self._memory = memory
        self._words = memoryview(memory).cast("q")
        self._words[_SAVED] = -1
        self._words[_STEP] = self._words[_STEPS_WRITTEN] = self._words[_SAVE_MICROSECONDS] = 0
        self.collective(None)
        self.phase(PHASES[0])

    @classmethod
    def open(cls, fd: int) -> "Heartbeat":
        """Write to the memory behind `fd`, of `create_memory`, which may then be closed. -1: nobody reads."""
        return cls(bytearray(_BYTES) if fd < 0 else mmap.mmap(fd, _BYTES))

    def phase(self, name: str) -> None:
        """From now on the rank is in this phase, one of PHASES."""
        if name == PHASES[-1]:
            self._end()
        else:
            self._words[_PHASE] = _now() | _PHASE_KINDS[name]

    def collective(self, name: str | None) -> None:
        """From now on the rank is in this collective, one of COLLECTIVES; None: in none any more."""
        self._words[_COLLECTIVE] = _now() | _COLLECTIVE_KINDS[name]

    def resume(self, step: int) -> None:
        """Training goes on after this step, which is saved; 0: it begins."""
        self._words[_STEP] = step
        self._words[_SAVED] = step or -1

    def step_done(self, times: StepTimes) -> None:
        """A step is finished."""
        written = self._words[_STEPS_WRITTEN]
        start = _slot_start(written)
        parts = (times.seconds, times.data_wait, times.compute, times.collective_wait, times.forward, times.backward)
        body = _TIMES.pack(times.step, *parts)
        self._memory[start : start + _TIMES.size + _CHECK.size] = body + _CHECK.pack(zlib.crc32(body))
        self._words[_STEPS_WRITTEN] = written + 1
        self._words[_STEP] = times.step

    def _end(self) -> None:
        """Where an error came from must not be lost while the rank winds up."""
        before, _ = _split(self._words[_PHASE])
        if before < _ENDING:
            self._words[_PHASE] = _now() | _ENDING | before << _PHASE_BITS

    def saved(self, step: int, seconds: float = 0.0) -> None:
        """A checkpoint of this step is durably there, after so long. May be called by the thread that saves."""
        self._words[_SAVE_MICROSECONDS] = round(1e6 * seconds)
        self._words[_SAVED] = step


class Pulse:
    """The reader's side of the memory behind `fd`, which may then be closed."""

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, _BYTES, access=mmap.ACCESS_READ)
        self._words = memoryview(self._memory).cast("q")

    def read(self) -> Beat:
        """What the memory says now. Before the rank has opened it: phase "starting", since the clock's beginning."""
        kind, phase_started = _split(self._words[_PHASE])
        phase, before = kind & ((1 << _PHASE_BITS) - 1), kind >> _PHASE_BITS
        collective, collective_changed = _split(self._words[_COLLECTIVE])
        saved = self._words[_SAVED]
        return Beat(
            step=self._words[_STEP],
            phase=PHASES[phase],
            phase_started_ns=phase_started,
            beat_ns=max(phase_started, collective_changed),
            saved_step=saved if saved > 0 else None,
            collective=COLLECTIVES[collective - 1] if collective else None,
            recent=self._recent(),
            save_seconds=self._words[_SAVE_MICROSECONDS] / 1e6,
            ended_in=PHASES[before] if phase == _ENDING else None,
        )

    def _recent(self) -> tuple[StepTimes, ...]:
        """Without what was being overwritten while we read."""
        written = self._words[_STEPS_WRITTEN]
        found = []
        for number in range(max(0, written - _SLOTS), written):
            start = _slot_start(number)
            slot = self._memory[start : start + _TIMES.size + _CHECK.size]
            body, check = slot[: _TIMES.size], slot[_TIMES.size :]
            if _CHECK.unpack(check)[0] == zlib.crc32(body):
                found.append(StepTimes(*_TIMES.unpack(body)))
        return tuple(found)

    def close(self) -> None:
        """Let the memory go."""
        self._words.release()
        self._memory.close()


def create_memory() -> int:
    """A file descriptor of fresh memory for one rank, to hand to it and to read with a Pulse. The caller closes it."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("gptdist-heartbeat")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.truncate(fd, _BYTES)
    return fd


_ENDING = len(PHASES) - 1
_PHASE_KINDS = {name: kind for kind, name in enumerate(PHASES)}
_COLLECTIVE_KINDS: dict[str | None, int] = {None: 0, **{name: kind for kind, name in enumerate(COLLECTIVES, start=1)}}


def _now() -> int:
    return time.monotonic_ns() // 1000 << _KIND_BITS


def _split(word: int) -> tuple[int, int]:
    """What is so, and since when, in nanoseconds."""
    return word & ((1 << _KIND_BITS) - 1), (word >> _KIND_BITS) * 1000


def _slot_start(number: int) -> int:
    return _HEADER_BYTES + number % _SLOTS * _SLOT_BYTES
