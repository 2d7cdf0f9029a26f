"""An answer that is awaited and read, by whoever has a task to wait in.

Theory of operation. A Response listens to its Question and keeps what comes until it is read.
Beyond the bound the upstream is paused, until all that waits has been read. `Upstream.send` makes
one; an answer that is passed on as it comes has a listener of its own instead.
"""

from __future__ import annotations

import asyncio
from collections import deque

from anser.core.errors import EngineBroken, EngineError
from anser.wire.connection import Head, Question

__all__ = ["Response"]


class Response:
    """An answer whose head has come: iterate its body, then `finish` or `close` it.

    As a context manager it closes itself: a body that was not read to its end is cut off.
    """

    __slots__ = (
        "_bound",
        "_chunks",
        "_ended",
        "_error",
        "_head",
        "_question",
        "_unread",
        "_waiter",
    )

    def __init__(self, buffer_bytes: int) -> None:
        self._bound = buffer_bytes
        self._question: Question | None = None
        self._head: Head | None = None
        self._chunks: deque[bytes] = deque()
        self._unread = 0
        self._ended = False
        self._error: EngineError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        status = 0 if self._head is None else self._head.status
        return f"<Response {status} unread={self._unread} ended={self._ended}>"

    @property
    def status(self) -> int:
        """200 to 599."""
        assert self._head is not None, self
        return self._head.status

    @property
    def until_eof(self) -> bool:
        """Whether only the end of the connection ends the body."""
        assert self._head is not None, self
        return self._head.until_eof

    def header(self, name: bytes) -> bytes:
        """The first value of this lower-case name, or nothing."""
        assert self._head is not None, self
        return self._head.header(name)

    async def begun(self, question: Question) -> Response:
        """Itself, once its head has come. Raises EngineUnreachable, EngineBroken, EngineStalled."""
        self._question = question
        while self._head is None:
            if self._error is not None:
                raise self._error
            await self._wait()
        return self

    def __aiter__(self) -> Response:
        return self

    async def __anext__(self) -> bytes:
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            await self._wait()
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._unread = 0
        if self._question is not None:
            self._question.resume()
        return data

    async def read(self, limit: int) -> bytes:
        """The whole body. Raises EngineBroken if it has more than `limit` bytes."""
        parts: list[bytes] = []
        size = 0
        async for data in self:
            size += len(data)
            if size > limit:
                self.close()
                raise EngineBroken(f"The engine's answer has more than {limit} bytes.")
            parts.append(data)
        return b"".join(parts)

    def finish(self) -> None:
        """All that matters has been read: keep the connection if the rest ends soon."""
        if self._question is not None:
            self._question.finish()
        self._leave()

    def close(self) -> None:
        """Keep the connection if the body is complete, else cut it at once; idempotent."""
        if self._question is not None:
            self._question.close()
        self._leave()

    def __enter__(self) -> Response:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _leave(self) -> None:
        self._question = None
        self._ended = True
        self._chunks.clear()
        self._unread = 0

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        except asyncio.CancelledError:
            self.close()
            raise
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # Told by the connection

    def head(self, head: Head) -> None:
        """The head has come."""
        self._head = head
        self._wake()

    def data(self, data: bytes) -> None:
        """The next bytes of the body."""
        self._chunks.append(data)
        self._unread += len(data)
        if self._unread > self._bound and self._question is not None:
            self._question.pause()
        self._wake()

    def complete(self) -> None:
        """The body has come whole."""
        self._question = None
        self._ended = True
        self._wake()

    def failed(self, error: EngineError) -> None:
        """It ends here."""
        self._question = None
        self._error = error
        self._wake()
