"""Saving while training goes on: a copy in host memory, and a thread that writes it with all ranks' threads.

Knows when buffers may be filled again, and what became of each save. Must not know engines, the loop, or how a
checkpoint is written (`write.py`). Training stands still for the copy, and for the last save's writing where that is
not over.
"""

import contextlib
import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptdist.checkpoint.fragment import HostFragment
from gptdist.checkpoint.snapshot import Fragment, HostBuffers, to_host
from gptdist.checkpoint.tensor_file import OnPhase, no_phase
from gptdist.checkpoint.write import SaveOptions, save_checkpoint
from gptdist.comms import Comms
from gptdist.errors import ConfigError


@dataclass(frozen=True)
class SaveOutcome:
    """What became of a save; the same on every rank but for the times: how long the caller stood still, and how long it
    took from the call to the end of all its work."""

    step: int
    path: Path | None
    error: Exception | None
    failed_in_a_row: int
    stall_seconds: float
    seconds: float


@dataclass
class _Job:
    step: int
    fragments: Sequence[HostFragment]
    state: dict[str, Any]
    began: float
    stall_seconds: float = 0.0


class CheckpointSaver:
    """Saves checkpoints of one run, in order. `comms` must be a channel that nothing else uses.

    Every rank calls `save`, `settle` and `wait` at the same steps. A failure is agreed on by all ranks' threads, but
    they learn of it at different moments: `poll` may be true on one rank a step before the others. So a rank tells the
    others that it is (`Wishes.settle_save`), and then all call `settle`.
    """

    def __init__(
        self,
        checkpoints_dir: Path,
        comms: Comms,
        options: SaveOptions | None = None,
        *,
        background: bool = True,
        on_phase: OnPhase = no_phase,
        on_saved: Callable[[int, Path, float], None] | None = None,
    ) -> None:
        """`on_saved(step, path, seconds)` is called after each good save, on every rank, by the thread that saved."""
        self.checkpoints_dir = checkpoints_dir
        self.last: SaveOutcome | None = None
        self.background = background
        self._comms = comms
        self._options = options or SaveOptions()
        self._on_phase = on_phase
        self._on_saved = on_saved
        self._buffers: HostBuffers | None = None
        self._changed = threading.Condition()
        # All below is guarded by `_changed`.
        self._jobs: deque[_Job] = deque()  # the first is being saved
        self._in_buffers: _Job | None = None
        self._failures: deque[SaveOutcome] = deque()  # not yet settled
        self._failed_in_a_row = 0
        self._lost: Exception | None = None
        self._closing = False
        self._thread: threading.Thread | None = None

    def prepare(self, fragments: Sequence[Fragment]) -> None:
        """Take the memory for copies of `fragments` now, so that too little of it is noticed before training.

        Raises ConfigError where there is not enough.
        """
        if self.background and self._buffers is None:
            try:
                self._buffers = HostBuffers(fragments)
            except (MemoryError, RuntimeError) as error:  # torch's own is a RuntimeError
                needed = sum(part.data.numel() * part.data.element_size() for part in fragments)
                raise ConfigError(
                    f"checkpoint.background keeps a copy of this rank's state in host memory, {needed:,} bytes, which "
                    f"cannot be had: {str(error).splitlines()[0] if str(error) else 'no memory'}. Use more nodes or "
                    "fewer ranks a node, or set checkpoint.background: false, which holds training up for each save."
                ) from error

    def save(self, step: int, fragments: Sequence[Fragment], state: dict[str, Any]) -> float:
        """Begin to save what the fragments and `state` are now; how long it held the caller up, in seconds.

        In the background it returns as soon as they are copied, else once the save is over. What became of it is an
        outcome, never an exception, unless the ranks have lost each other.
        """
        job = _Job(step, (), copy.deepcopy(state), time.perf_counter())
        if self.background:
            with self._changed:
                self._await(lambda: self._in_buffers is None)
                self._in_buffers = job
            self.prepare(fragments)
            assert self._buffers is not None
            job.fragments = self._buffers.copy(fragments)
            job.stall_seconds = time.perf_counter() - job.began
            self._hand_over(job)
        else:
            self.wait()
            job.fragments = to_host(fragments)
            self._jobs.append(job)
            self._run(job)
            self._raise_lost()
        return time.perf_counter() - job.began

    def poll(self) -> bool:
        """Whether a save has failed that was not settled. Raises what only this rank met: the others are lost."""
        with self._changed:
            self._raise_lost()
            return bool(self._failures)

    def settle(self) -> SaveOutcome:
        """The first failed save that was not settled, the same on every rank; waits until this rank's thread has it.

        To be called only where some rank's `poll` is true.
        """
        with self._changed:
            self._await(lambda: bool(self._failures))
            return self._failures.popleft()

    def wait(self) -> SaveOutcome | None:
        """Until all saves are over; the outcome of the last one."""
        with self._changed:
            self._await(lambda: not self._jobs)
            return self.last

    def close(self, patience_seconds: float | None = None) -> None:
        """Finish what was begun, for at most `patience_seconds`, and end the thread. Never raises."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(patience_seconds)

    # -- the thread --------------------------------------------------------------------------------------------------

    def _hand_over(self, job: _Job) -> None:
        with self._changed:
            self._jobs.append(job)
            if self._thread is None:
                # A daemon: where another rank is gone, an end with an error must not wait for it.
                self._thread = threading.Thread(target=self._serve, name="checkpoint-saver", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._jobs) or self._closing)
                if not self._jobs:
                    return
                job = self._jobs[0]
            self._run(job)

    def _run(self, job: _Job) -> None:
        path: Path | None = None
        failure: Exception | None = None
        try:
            if self._lost is not None:
                raise self._lost
            path = save_checkpoint(
                self.checkpoints_dir,
                job.step,
                job.fragments,
                job.state,
                self._comms,
                self._options,
                on_phase=self._on_phase,
                on_written=lambda: self._release(job),
            )
            if self._on_saved is not None:
                self._on_saved(job.step, path, time.perf_counter() - job.began)
        except Exception as error:
            failure = error
        self._release(job)
        seconds = time.perf_counter() - job.began
        stall_seconds = job.stall_seconds if self.background else seconds
        with self._changed:
            self._failed_in_a_row = 0 if failure is None else self._failed_in_a_row + 1
            self.last = SaveOutcome(job.step, path, failure, self._failed_in_a_row, stall_seconds, seconds)
            if failure is not None and self._comms.is_broken:
                self._lost = failure
            elif failure is not None:
                self._failures.append(self.last)
            self._jobs.popleft()
            self._changed.notify_all()

    def _release(self, job: _Job) -> None:
        """The buffers are free again, unless they hold another save's copy by now."""
        with self._changed:
            if self._in_buffers is job:
                self._in_buffers = None
            self._changed.notify_all()

    def _await(self, happened: Callable[[], bool]) -> None:
        """Wait, `_changed` held, for what the thread does. Raises what the thread met where the ranks are lost."""
        self._changed.wait_for(lambda: happened() or self._lost is not None)
        self._raise_lost()

    def _raise_lost(self) -> None:
        if self._lost is not None:
            raise self._lost

    def __enter__(self) -> "CheckpointSaver":
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(Exception):
            self.close()
