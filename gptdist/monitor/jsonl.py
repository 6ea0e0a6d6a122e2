"""The record every run keeps: one JSON object a line, in `metrics.jsonl` of the run's folder.

Knows no names of values. A restart appends: where a step is there twice, the later line counts.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptdist.monitor.append import append_whole


class JsonlSink:
    """Lines such as `{"time": 1700000000.0, "step": 10, "train/loss": 3.2}`; text as `tag` and `text`."""

    name = "jsonl"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._checked_end = False

    def log(self, step: int, values: Mapping[str, float]) -> None:
        # NaN and the infinities are not JSON: null keeps the line readable everywhere.
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._append({"time": time.time(), "step": step, **finite})

    def text(self, step: int, tag: str, text: str) -> None:
        self._append({"time": time.time(), "step": step, "tag": tag, "text": text})

    def close(self) -> None:
        """Nothing is held open."""

    def _append(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        if not self._checked_end:
            # A run killed in the middle of a line must not spoil the first line of this one.
            line = b"\n" + line if _ends_torn(self._path) else line
        append_whole(self._path, line)
        self._checked_end = True


def _ends_torn(path: Path) -> bool:
    """Whether the file's last line has no end."""
    try:
        with path.open("rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except FileNotFoundError:
        return False
