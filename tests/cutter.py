"""A door in front of an engine that can be shut in the middle of an answer, at any byte."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

__all__ = ["Cutter", "cutter"]


@dataclass(slots=True)
class Cutter:
    """Passes all bytes on, until so many more events have passed: `event` is cut in the middle."""

    target: str
    url: str = ""
    event: int | None = None
    _talks: set[asyncio.Task[None]] = field(default_factory=set[asyncio.Task[None]])

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        task = asyncio.current_task()
        assert task is not None
        self._talks.add(task)
        try:
            address = urlsplit(self.target)
            up_reader, up_writer = await asyncio.open_connection(address.hostname, address.port)
            asking = asyncio.ensure_future(_pass(reader, up_writer))
            try:
                await self._answer(up_reader, writer)
            finally:
                asking.cancel()
                up_writer.transport.abort()
        except OSError:
            pass  # the server has gone, and so does the client
        finally:
            writer.transport.abort()
            self._talks.discard(task)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65_536):
                parts = data.split(b"data: ")
                cut = self.event is not None and len(parts) - 1 > self.event
                if self.event is not None and cut:
                    parts = parts[: self.event + 2]
                    parts[-1] = parts[-1][: len(parts[-1]) // 2]
                    self.event = None
                elif self.event is not None:
                    self.event -= len(parts) - 1
                writer.write(b"data: ".join(parts))
                await writer.drain()
                if cut:
                    return

    def stop(self) -> None:
        """Cut all that is open."""
        for talk in self._talks:
            talk.cancel()


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()


@asynccontextmanager
async def cutter(target: str) -> AsyncGenerator[Cutter]:
    """A door in front of the server at `target`, a URL."""
    found = Cutter(target)
    server = await asyncio.start_server(found.serve, "127.0.0.1", 0)
    found.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield found
    finally:
        found.stop()
        server.close()
