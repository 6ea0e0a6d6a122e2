"""Where a rank is in a step, which collective it waits in, and where the step's time went: told to its heartbeat.

The loop and the engine say which phase begins; collectives are noticed by themselves. On a CPU whatever waits in one,
be it of torch, Megatron or DeepSpeed, waits in `Work.wait`, so that is what is wrapped while a run is on. On a GPU
collectives run by themselves and the host waits elsewhere: there the calls that launch them give the name of the one
launched last, and events around launch and wait how long the stream stood. Nothing that is computed depends on this.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch._C import _current_graph_task_id
from torch._C._distributed_c10d import OpType  # type: ignore[attr-defined]
from torch.distributed import ProcessGroup, Work

from gptdist.engine.device_waits import DeviceWaits
from gptdist.monitor.heartbeat import COLLECTIVES, Heartbeat, StepTimes

_BOTH_WAYS = "forward and backward"


class StepClock:
    """One rank's clock. All methods belong to the thread that trains."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        self.heartbeat = heartbeat
        self.waited = 0.0  # in collectives, seconds so far
        self._phase, self._entered = "", 0.0
        self._both_ways = self._forward = 0.0  # of this step
        self._began = self._waited_before = 0.0
        self._launched = COLLECTIVES[-1]
        self._device_waits: DeviceWaits | None = None

    def phase(self, name: str) -> None:
        """The rank enters this phase, one of `heartbeat.PHASES`."""
        self.heartbeat.phase(name)
        now = self._own_time()
        if self._phase == _BOTH_WAYS:
            self._both_ways += now - self._entered
        self._phase, self._entered = name, now

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Within it a micro-batch goes forward."""
        before = self._own_time()
        yield
        self._forward += self._own_time() - before

    def begin_step(self) -> None:
        """A step begins, with waiting for its data."""
        self.phase("waiting for data")
        self._both_ways = self._forward = 0.0
        self._began, self._waited_before = time.perf_counter(), self.waited

    def end_step(self, step: int, data_wait: float) -> StepTimes:
        """The step is finished; `data_wait`: how many seconds of it went by until its data was there."""
        self.phase("logging")
        seconds = time.perf_counter() - self._began
        if self._device_waits is not None:
            self.waited += self._device_waits.take_seconds()
        collective_wait = self.waited - self._waited_before
        times = StepTimes(
            step,
            seconds,
            data_wait,
            compute=max(0.0, seconds - data_wait - collective_wait),
            collective_wait=collective_wait,
            forward=self._forward,
            backward=max(0.0, self._both_ways - self._forward),
        )
        self.heartbeat.step_done(times)
        return times

    @contextmanager
    def watching_collectives(self, device: str) -> Iterator[None]:
        """Within it the collectives of this process are noticed. `device`: "cpu" or "cuda", what they work on."""
        wrapped: list[tuple[type, str, Any]] = [
            (ProcessGroup, name, self._wrap_launch(name, device)) for name in _launching_methods()
        ]
        if device == "cpu":
            wrapped.append((Work, "wait", self._wrap_wait()))
        elif (waits := DeviceWaits.of_this_device()) is not None:
            self._device_waits = waits
            wrapped = [(owner, name, _within(waits, method)) for owner, name, method in wrapped]
            wrapped.append((Work, "wait", _within(waits, Work.wait)))
        plain = [(owner, name, vars(owner)[name]) for owner, name, _ in wrapped]  # getattr would give it unbound
        try:
            for owner, name, method in wrapped:
                setattr(owner, name, method)
            yield
        finally:
            for owner, name, method in plain:
                setattr(owner, name, method)
            self._device_waits = None

    def _own_time(self) -> float:
        """A clock that stands still in collectives."""
        return time.perf_counter() - self.waited

    def _wrap_launch(self, native: str, device: str) -> Callable[..., Any]:
        launch, name = getattr(ProcessGroup, native), collective_name(native)
        training, get_ident = threading.get_ident(), threading.get_ident

        def on_cpu(group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            if get_ident() == training:
                self._launched = name
            return launch(group, *args, **kwargs)

        def on_gpu(group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            # Backward has threads of its own there, and works over NCCL; messages beside training work over gloo.
            if get_ident() == training or group.name() != "gloo":
                self.heartbeat.collective(name)
            return launch(group, *args, **kwargs)

        return on_cpu if device == "cpu" else on_gpu

    def _wrap_wait(self) -> Callable[..., Any]:
        wait = Work.wait
        training, heartbeat = threading.get_ident(), self.heartbeat
        get_ident, perf_counter = threading.get_ident, time.perf_counter

        def noticed(work: Work, *args: Any, **kwargs: Any) -> Any:
            if get_ident() != training:  # messages about a checkpoint, beside training
                return wait(work, *args, **kwargs)
            kind = work._get_op_type()  # type: ignore[attr-defined]
            heartbeat.collective(_KINDS.get(kind) or self._launched)
            began = perf_counter()
            try:
                return wait(work, *args, **kwargs)
            finally:
                self.waited += perf_counter() - began
                heartbeat.collective(None)

        return noticed


def _within(waits: DeviceWaits, function: Callable[..., Any]) -> Callable[..., Any]:
    training, get_ident = threading.get_ident(), threading.get_ident

    def measured(*args: Any, **kwargs: Any) -> Any:
        if get_ident() != training and _current_graph_task_id() < 0:  # neither training nor a thread of backward's
            return function(*args, **kwargs)
        with waits.waiting():
            return function(*args, **kwargs)

    return measured


def collective_name(native: str) -> str:
    """One of COLLECTIVES, by what torch calls it: `_allgather_base`, `ALLREDUCE_COALESCED`."""
    squeezed = native.replace("_", "").lower()
    longest_first = sorted(COLLECTIVES, key=len, reverse=True)
    return next((name for name in longest_first if name.replace("_", "") in squeezed), COLLECTIVES[-1])


def _launching_methods() -> list[str]:
    named = (name for name in dir(ProcessGroup) if not name.startswith("__"))
    return [name for name in named if collective_name(name) != COLLECTIVES[-1]]


_NAMED = {int(kind): collective_name(name) for name, kind in OpType.__members__.items()}
# Several may be under way, and what is waited for says what it is; but for some of gloo's, which say that they are
# unknown: then it is what was launched last.
_KINDS = {kind: name for kind, name in _NAMED.items() if name != COLLECTIVES[-1]}
