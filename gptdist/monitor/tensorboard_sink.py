"""Values and texts as TensorBoard event files; the only importer of tensorboard.

Uses tensorboard's record format and protocol buffers, not its event writer: that one writes from a thread of its own,
where a full disk ends in a traceback on the console and is noticed late. Knows no names of values.
"""

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptdist.monitor.append import append_whole


class TensorBoardSink:
    """One event file a process, in `log_dir`; made with the first value, so that tensorboard is imported only then."""

    name = "tensorboard"

    def __init__(self, log_dir: Path, start_step: int) -> None:
        """`start_step`: steps done so far; TensorBoard drops later ones that an earlier process left in the folder."""
        now = time.time_ns()
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{now // 10**9:010d}.{now % 10**9:09d}.{socket.gethostname()}.{os.getpid()}"
        self._path = log_dir / name
        self._purge_step = start_step + 1 if start_step else 0
        self._started = False
        self._last_step = 0

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._append(step, Summary(value=scalars))

    def text(self, step: int, tag: str, text: str) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING

        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        # The plugin renders Markdown; an indented block is shown as it is.
        block = "\n".join("    " + line for line in text.splitlines()).encode()
        tensor = TensorProto(dtype=DT_STRING, string_val=[block])
        self._append(step, Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=tensor)]))

    def close(self) -> None:
        """Nothing is held open."""

    def _append(self, step: int, summary: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        now = time.time()
        events = [Event(wall_time=now, step=step, summary=summary)]
        if not self._started:
            version = Event(wall_time=now, file_version="brain.Event:2")
            events = [version, _start(now, self._purge_step), *events]
        elif step < self._last_step:
            events = [_start(now, step + 1), *events]  # the run went back to this step
        append_whole(self._path, _records(events))
        self._started = True
        self._last_step = step


def _start(wall_time: float, step: int) -> Any:
    """The mark after which TensorBoard drops what it has of `step` and later ones."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    return Event(wall_time=wall_time, step=step, session_log=SessionLog(status=SessionLog.START))


def _records(events: list[Any]) -> bytes:
    """The events as one run of bytes in the event file's framing."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    for event in events:
        writer.write(event.SerializeToString())
    return buffer.getvalue()
