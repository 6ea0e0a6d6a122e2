"""How long a GPU's stream stood in collectives: there the host launches them and goes on, and does not wait itself.

Measured by pairs of events on the stream that trains, a few microseconds each. Knows streams and events; not what runs
between them. What runs on other streams beside it (such as DeepSpeed's all-gathers of ZeRO 3) is left out.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class DeviceWaits:
    """Of the stream that is current where it is made. `current_stream`, `new_event`: as torch.cuda has them."""

    def __init__(self, current_stream: Callable[[], Any], new_event: Callable[[], Any]) -> None:
        self._current_stream = current_stream
        self._new_event = new_event
        self._stream = current_stream()
        self._spare: list[Any] = []
        self._pairs: deque[tuple[Any, Any]] = deque()

    @classmethod
    def of_this_device(cls) -> "DeviceWaits | None":
        """None where there is no GPU."""
        if not torch.cuda.is_available():
            return None
        return cls(torch.cuda.current_stream, lambda: torch.cuda.Event(enable_timing=True))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What is asked of the stream within it is waiting."""
        if self._current_stream() != self._stream:
            yield
            return
        began, ended = self._event(), self._event()
        began.record()
        try:
            yield
        finally:
            ended.record()
            self._pairs.append((began, ended))

    def take_seconds(self) -> float:
        """How long it waited since this was last asked; what is still under way comes the next time."""
        total = 0.0
        while self._pairs and self._pairs[0][1].query():
            began, ended = self._pairs.popleft()
            total += began.elapsed_time(ended) / 1000
            self._spare += (began, ended)
        return total

    def _event(self) -> Any:
        return self._spare.pop() if self._spare else self._new_event()
