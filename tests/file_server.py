"""An HTTP server for one file that can cut, lie, change and dawdle."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

__all__ = ["FileServer", "Request", "serving"]


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it came; header names in lower case."""

    method: str
    path: str
    headers: dict[str, str]


@dataclass
class FileServer:
    """What it serves, and what it does wrong."""

    data: bytes = b""
    etag: str = '"one"'
    ranges: bool = True
    statuses: list[int] = field(default_factory=list)  # answered first, one each
    cuts: list[int] = field(default_factory=list)  # body bytes before the connection drops
    extra_bytes: int = 0  # beyond what it has, sent and announced
    announce: int | None = None  # a Content-Length that is not true
    wrong_part: int = 0  # how far from the asked place its part begins
    chunk_s: float = 0.0  # pause before each 1,000 bytes
    silent: bool = False  # accepts and never answers
    redirect: str | None = None
    login: str | None = None  # user:password, without which it answers 401
    extra_headers: dict[str, str] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def gets(self) -> list[Request]:
        """The requests for the file itself."""
        return [request for request in self.requests if request.method == "GET"]

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection, one request."""
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                request = _read(await reader.readuntil(b"\r\n\r\n"))
                self.requests.append(request)
                if self.silent:
                    await reader.read()
                else:
                    await self._answer(request, writer)
        finally:
            writer.close()

    async def _answer(self, request: Request, writer: asyncio.StreamWriter) -> None:
        status, headers, body = self._plan(request)
        if self.login is not None and request.headers.get("authorization") != _basic(self.login):
            status, headers, body = 401, {"www-authenticate": 'Basic realm="x"'}, b""
        if self.statuses:
            status, body = self.statuses.pop(0), b""
        headers["content-length"] = str(len(body))
        if self.announce is not None:
            headers["content-length"] = str(self.announce)
        headers |= {"connection": "close", **self.extra_headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"HTTP/1.1 {status} X\r\n{head}\r\n".encode())
        if request.method == "HEAD":
            return await writer.drain()
        if self.cuts:
            body = body[: self.cuts.pop(0)]
        for begin in range(0, len(body), 1_000):
            if self.chunk_s:
                await asyncio.sleep(self.chunk_s)
            writer.write(body[begin : begin + 1_000])
            await writer.drain()
        return None

    def _plan(self, request: Request) -> tuple[int, dict[str, str], bytes]:
        if self.redirect is not None:
            return 302, {"location": self.redirect}, b""
        whole = self.data + bytes(self.extra_bytes)
        headers = {"etag": self.etag, "accept-ranges": "bytes"}
        wish = re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", ""))
        unchanged = request.headers.get("if-range", self.etag) == self.etag
        if wish is None or not self.ranges or not unchanged:
            return 200, headers, whole
        begin = int(wish[1]) + self.wrong_part
        if begin >= len(whole):
            return 416, headers, b""
        headers["content-range"] = f"bytes {begin}-{len(whole) - 1}/{len(whole)}"
        return 206, headers, whole[begin:]


def _basic(login: str) -> str:
    return f"Basic {base64.b64encode(login.encode()).decode()}"


def _read(head: bytes) -> Request:
    first, *lines = head.decode("latin-1").strip().split("\r\n")
    method, path, _ = first.split(" ")
    pairs = (line.split(": ", 1) for line in lines)
    return Request(method, path, {name.lower(): value for name, value in pairs})


@asynccontextmanager
async def serving(*servers: FileServer) -> AsyncGenerator[None]:
    """Run the servers on ports of their own; in the end whoever is still served is cut off."""
    async with asyncio.TaskGroup() as tasks, contextlib.AsyncExitStack() as stack:
        for server in servers:
            connections: set[asyncio.Task[None]] = set()
            accept = partial(_accept, tasks, connections, server)
            socket = await asyncio.start_server(accept, "127.0.0.1", 0)
            server.port = socket.sockets[0].getsockname()[1]
            stack.callback(_stop, socket, connections)
        yield


def _accept(
    tasks: asyncio.TaskGroup,
    connections: set[asyncio.Task[None]],
    server: FileServer,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    connections.add(tasks.create_task(server.handle(reader, writer)))


def _stop(socket: asyncio.Server, connections: set[asyncio.Task[None]]) -> None:
    socket.close()
    for task in connections:
        task.cancel()
