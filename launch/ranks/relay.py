"""Copies one rank's output to the launcher's, line by line, each line tagged.

Never blocks on the rank, and never lets a closed terminal or pipe of the launcher's hurt the run.
"""

import os

LONGEST_LINE = 1 << 16
ERASE_LINE = b"\r\x1b[K"


class LineRelay:
    """From the read end of a pipe to a file descriptor of the launcher's."""

    def __init__(self, source_fd: int, target_fd: int, tag: str) -> None:
        os.set_blocking(source_fd, False)
        self.source_fd = source_fd
        self._target_fd = target_fd
        # On a terminal the tag wipes what stands of a progress bar; the bar draws itself again below.
        self._tag = (ERASE_LINE if os.isatty(target_fd) else b"") + tag.encode()
        self._partial = b""

    def pump(self) -> bool:
        """Copy what is there; False once the writers have closed their end."""
        while True:
            try:
                data = os.read(self.source_fd, LONGEST_LINE)
            except BlockingIOError:
                return True
            if not data:
                return False
            *lines, self._partial = (self._partial + data).split(b"\n")
            if len(self._partial) >= LONGEST_LINE:
                lines, self._partial = [*lines, self._partial], b""
            self._write(lines)

    def close(self) -> None:
        """Copy what is left, also a last line without its end. What grandchildren still write is not waited for."""
        self.pump()
        if self._partial:
            self._write([self._partial])
        os.close(self.source_fd)

    def _write(self, lines: list[bytes]) -> None:
        data = b"".join(self._tag + line + b"\n" for line in lines)
        try:
            while data:
                data = data[os.write(self._target_fd, data) :]
        except OSError:
            return  # nobody reads any more; training goes on
