"""Lines over a connected socket, both ways, without ever waiting: what an agent and the lead talk through.

Knows bytes and their bounds, no messages. What arrives may be anything from anybody.
"""

import socket
from contextlib import suppress

LONGEST_LINE = 4 << 20
"""Of a peer that is known; it holds the stacks of a machine's ranks."""
LONGEST_BACKLOG = 16 << 20
_CHUNK = 1 << 16


class Closed(Exception):
    """There is no more talking to this peer; the text says why."""


class Channel:
    """Over `connection`, which it owns. `longest_line` may be raised once it is known who is there."""

    def __init__(self, connection: socket.socket, longest_line: int = LONGEST_LINE) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.longest_line = longest_line
        self._connection = connection
        self._received = bytearray()
        self._unsent = bytearray()
        self._ended = ""  # why nothing more can come

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, line: bytes) -> None:
        """What does not go out now goes with a later call. Raises Closed."""
        self._unsent += line
        self.flush()
        if len(self._unsent) > LONGEST_BACKLOG:
            raise Closed("it takes nothing any more")

    def flush(self) -> bool:
        """Whether everything has gone out. Raises Closed."""
        while self._unsent:
            try:
                sent = self._connection.send(self._unsent)
            except BlockingIOError:
                return False
            except OSError as error:
                raise Closed(f"its connection broke ({error.strerror or error})") from None
            del self._unsent[:sent]
        return True

    def receive(self, most: int | None = None) -> list[bytes]:
        """The whole lines that are there, the first `most` of them; others stay for the next call, for which nothing
        need arrive. Raises Closed once there are none left and no more can come."""
        self._read()
        *lines, self._received = self._received.split(b"\n")
        if max(map(len, (self._received, *lines))) > self.longest_line:
            raise Closed(f"it sent a line of more than {self.longest_line:,} bytes")
        if not lines and self._ended:
            raise Closed(self._ended)
        if most is not None:
            self._received = bytearray(b"\n".join([*lines[most:], self._received]))
        return [bytes(line) for line in lines[:most]]

    def _read(self) -> None:
        while not self._ended and len(self._received) <= self.longest_line:
            try:
                data = self._connection.recv(_CHUNK)
            except BlockingIOError:
                return
            except OSError as error:
                self._ended = f"its connection broke ({error.strerror or error})"
                return
            if not data:
                self._ended = "its connection was closed"
            self._received += data

    def end(self) -> None:
        """Say that nothing more comes; what was sent still arrives."""
        with suppress(Closed, OSError):
            self.flush()
            self._connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._connection.close()
