"""An upstream that says, byte for byte, what a script tells it.

    async def script(talk: Talk) -> None:
        await talk.request()
        await talk.say(b"HTTP/1.1 200 OK\r\n", b"Content-Length: 2\r\n\r\nhi")

    async with Hostile(script) as hostile:
        ... connect to hostile.port ...

Each connection runs the script from its start; when it returns, the connection is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

__all__ = [
    "SSE_HEAD",
    "Hostile",
    "Script",
    "Seen",
    "Talk",
    "answer",
    "chunked",
    "delta",
    "event",
    "stream",
]

SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)


@dataclass(frozen=True, slots=True)
class Seen:
    """A request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, object]:
        """The body, decoded."""
        value = json.loads(self.body)
        assert isinstance(value, dict)
        return value


@dataclass(slots=True)
class Talk:
    """One connection, from the upstream's side."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    seen: list[Seen]
    number: int  # of this connection, from 1

    async def request(self) -> Seen:
        """Read one request; raises IncompleteReadError when the client has left."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.strip().split("\r\n")
        method, path, _ = first.split(" ")
        headers = {k.lower(): v.strip() for k, v in (line.split(":", 1) for line in lines)}
        body = await self.reader.readexactly(int(headers.get("content-length", "0")))
        seen = Seen(method, path, headers, body)
        self.seen.append(seen)
        return seen

    async def say(self, *parts: bytes) -> None:
        """Send these bytes, each part as a packet of its own."""
        for part in parts:
            self.writer.write(part)
            await self.writer.drain()
            await asyncio.sleep(0)

    async def gone(self) -> bool:
        """Whether the client hangs up within five seconds."""
        try:
            async with asyncio.timeout(5):
                while await self.reader.read(65_536):
                    pass
        except TimeoutError:
            return False
        except ConnectionError:
            pass
        return True

    def reset(self) -> None:
        """Close with a TCP reset."""
        raw: socket.socket = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Script = Callable[[Talk], Awaitable[None]]


@dataclass(slots=True)
class Hostile:
    """A server on a free loopback port that runs one script per connection."""

    script: Script
    tls: ssl.SSLContext | None = None
    seen: list[Seen] = field(default_factory=list)
    hung_up: asyncio.Event = field(default_factory=asyncio.Event)  # a client left a script early
    connections: int = 0
    failure: BaseException | None = None
    port: int = 0
    _server: asyncio.Server | None = None
    _talks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._talks:
            task.cancel()
        if self._talks:
            await asyncio.wait(self._talks, timeout=2)
        if kind is None and self.failure is not None:
            raise self.failure

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._talks.add(task)
        try:
            await self.script(Talk(reader, writer, self.seen, self.connections))
        except (ConnectionError, asyncio.IncompleteReadError):
            self.hung_up.set()
        except asyncio.CancelledError:
            writer.transport.abort()  # the test is over
        except (AssertionError, ValueError) as error:
            self.failure = error
        finally:
            self._talks.discard(task)
            with contextlib.suppress(ConnectionError):
                writer.close()


def answer(body: bytes, *, status: str = "200 OK", kind: str = "application/json") -> bytes:
    """A whole answer with a length."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def chunked(data: bytes) -> bytes:
    """One HTTP chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(payload: bytes) -> bytes:
    """One server-sent event as one HTTP chunk."""
    return chunked(b"data: " + payload + b"\n\n")


def delta(text: str = "", *, finish: str | None = None, usage: int | None = None) -> bytes:
    """One chunk of a chat answer, as an event; with `usage`, the chunk that reports usage."""
    choice = {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": finish}
    chunk: dict[str, object] = {"id": "c1", "object": "chat.completion.chunk", "created": 1}
    chunk |= {"model": "m", "choices": [choice] if usage is None else []}
    if usage is not None:
        total = {"prompt_tokens": 3, "completion_tokens": usage, "total_tokens": 3 + usage}
        chunk["usage"] = total
    return event(json.dumps(chunk, separators=(",", ":")).encode())


def stream(*texts: str) -> bytes:
    """A whole sound answer: head, texts, finish, usage, [DONE]."""
    parts = [delta(text) for text in texts]
    parts += [delta(finish="stop"), delta(usage=len(texts)), event(b"[DONE]"), b"0\r\n\r\n"]
    return SSE_HEAD + b"".join(parts)
