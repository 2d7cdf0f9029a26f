"""A guarded uvicorn with a tiny application, and a client that sends raw bytes to it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from starlette.types import Receive, Scope, Send

from anser.wire.doors import Door
from anser.wire.server import GuardSettings

__all__ = ["Client", "Guarded", "guarded_server", "post"]


@dataclass(slots=True)
class Guarded:
    """The server as its application sees it."""

    port: int = 0
    paths: list[str] = field(default_factory=list)  # of requests that reached the application
    bodies: list[bytes] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)  # a client left before its answer
    go: asyncio.Event = field(default_factory=asyncio.Event)
    sent: int = 0  # bytes that /pour has written

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Echo the body; some paths are slow, endless, or do not read."""
        self.paths.append(scope["path"])
        match scope["path"]:
            case "/early":
                await reply(send, b"early")
            case "/unread":
                await self.go.wait()
                await reply(send, b"unread")
            case "/duplex":
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": b"begun", "more_body": True})
                if await self._body(receive) is not None:
                    await send({"type": "http.response.body", "body": b"ended"})
            case "/wait":
                await self._wait(receive, send)
            case "/pour":
                await self._pour(send)
            case _:
                body = await self._body(receive)
                if body is not None:
                    self.bodies.append(body)
                    await reply(send, b"%s:%d" % (scope["path"].encode(), len(body)))

    async def _body(self, receive: Receive) -> bytes | None:
        parts, more = [], True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.left.set()
                return None
            parts.append(message["body"])
            more = message["more_body"]
        return b"".join(parts)

    async def _wait(self, receive: Receive, send: Send) -> None:
        """Answer when told to; note a client that leaves before."""
        await self._body(receive)
        async with asyncio.TaskGroup() as group:
            gone = group.create_task(receive())
            going = group.create_task(self.go.wait())
            await asyncio.wait({gone, going}, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                self.left.set()
            else:
                await reply(send, b"waited")
            gone.cancel()
            going.cancel()

    async def _pour(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(4_096):
            await send({"type": "http.response.body", "body": b"x" * 65_536, "more_body": True})
            self.sent += 65_536
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def reply(send: Send, body: bytes) -> None:
    """A whole answer."""
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def guarded_server(
    settings: GuardSettings,
    *,
    tls: ssl.SSLContext | None = None,
    proxy_protocol: bool = False,
) -> AsyncIterator[Guarded]:
    """Serve while the context is open."""
    tiny = Guarded()
    with socket.create_server(("127.0.0.1", 0), backlog=2_048) as listener:
        tiny.port = listener.getsockname()[1]
        door = Door(tiny, listener, settings, tls=tls, proxy_protocol=proxy_protocol)
        async with asyncio.TaskGroup() as group:
            group.create_task(door.serve())
            await door.opened.wait()
            try:
                yield tiny
            finally:
                door.close(quickly=True)


@dataclass(slots=True)
class Client:
    """A raw connection to the server."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    @asynccontextmanager
    async def to(
        cls, server: Guarded, *, tls: ssl.SSLContext | None = None
    ) -> AsyncIterator[Client]:
        """Connect, and close at the end."""
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=tls)
        try:
            yield cls(reader, writer)
        finally:
            writer.transport.abort()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    def send(self, data: bytes) -> None:
        """Send these bytes."""
        self.writer.write(data)

    async def answer(self) -> tuple[int, bytes, bytes]:
        """The next answer: status, head and body."""
        async with asyncio.timeout(10):
            head = await self.reader.readuntil(b"\r\n\r\n")
            lengths = [line for line in head.lower().split(b"\r\n") if b"content-length:" in line]
            body = await self.reader.readexactly(int(lengths[0].split(b":")[1]))
        return int(head.split(b" ")[1]), head, body

    async def closed(self) -> bool:
        """Whether the server closes without another word, in ten seconds."""
        try:
            async with asyncio.timeout(10):
                return await self.reader.read(1) == b""
        except ConnectionError:
            return True
        except TimeoutError:
            return False


def post(path: str = "/", body: bytes = b"", *, headers: bytes = b"") -> bytes:
    """A well-formed request."""
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n".encode()
    return head + headers + b"\r\n" + body
