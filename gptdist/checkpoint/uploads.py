"""Finished checkpoints to a URL, while training and saving go on; a failure is said and counted, and stops nothing.

Knows a queue and a thread. How a checkpoint is copied is `copying.py`'s. Each rank has one; they upload together.
"""

import logging
import threading
from collections import deque
from pathlib import Path

from gptdist.checkpoint.copying import upload_checkpoint
from gptdist.comms import Comms
from gptdist.remote import RemoteFolder

_log = logging.getLogger(__name__)


class Uploader:
    """Uploads what it is given, in order, but for what a newer one has overtaken. `comms`: a channel of its own."""

    def __init__(self, url: str, comms: Comms, *, attempts: int = 6, first_wait_seconds: float = 1.0) -> None:
        self._stopping = threading.Event()
        self._remote = RemoteFolder(url, attempts, first_wait_seconds, self._stopping)
        self._comms = comms
        self._changed = threading.Condition()
        self._waiting: deque[Path] = deque()  # the first is being uploaded
        self._closing = False
        self._thread: threading.Thread | None = None
        self.failed_in_a_row = 0

    def submit(self, path: Path) -> None:
        """Upload this checkpoint soon. On every rank, in the same order."""
        with self._changed:
            self._waiting.append(path)
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="checkpoint-uploader", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def pending(self) -> list[Path]:
        """What must not be deleted yet."""
        with self._changed:
            return list(self._waiting)

    def close(self, patience_seconds: float | None = None) -> None:
        """Finish what was begun, for at most `patience_seconds`. Never raises."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(patience_seconds)
            if self._thread.is_alive():
                self._stopping.set()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting) or self._closing)
                if not self._waiting:
                    return
                path = self._waiting[0]
                overtaken = len(self._waiting) > 1
            self._upload(path, overtaken)
            with self._changed:
                self._waiting.popleft()

    def _upload(self, path: Path, overtaken: bool) -> None:
        shown = self._remote.shown(path.name)
        try:
            if self._comms.is_broken:
                return
            if self._comms.broadcast(overtaken):  # as rank 0 sees it: another rank may not have the newer one yet
                self._warn(f"{path} is not uploaded: a newer one is there already")
                return
            upload_checkpoint(path, self._remote, path.name, self._comms)
            self.failed_in_a_row = 0
        except Exception as error:
            self.failed_in_a_row += 1
            self._warn(f"{path} was not uploaded to {shown} ({self.failed_in_a_row} in a row): {error}")

    def _warn(self, text: str) -> None:
        if self._comms.is_first and not self._stopping.is_set():
            _log.warning("%s", text)
