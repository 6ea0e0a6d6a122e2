"""One completion at a time, in the order of asking, computed beside the event loop.

Nothing more is computed for who leaves. Knows asyncio and how a completion is iterated; no HTTP.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager

from gptdist.serve.completion import Piece


class Turns:
    """A queue before one thread: threads of a library's own are started once, and nothing runs at the same time."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()  # wakes those who wait in their order
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="completion")

    @asynccontextmanager
    async def take(self, start: Callable[[], Generator[Piece, None, None]]) -> AsyncIterator[AsyncIterator[Piece]]:
        """The pieces of `start()`, once it is its turn; no more are computed after the block is left."""
        async with self._turn:
            pieces = self._pieces(start())
            async with aclosing(pieces):
                yield pieces

    async def _pieces(self, computed: Generator[Piece, None, None]) -> AsyncGenerator[Piece, None]:
        loop = asyncio.get_running_loop()
        try:
            while (piece := await loop.run_in_executor(self._thread, next, computed, None)) is not None:
                yield piece
        finally:
            # In the same thread, hence after a token that may still be at work there.
            self._thread.submit(computed.close)

    def close(self) -> None:
        """Wait for the token at work, if there is one."""
        self._thread.shutdown(cancel_futures=True)
