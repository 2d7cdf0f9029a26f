"""An application of this process behind httpx, with answers that stream as they are made.

httpx's own ASGITransport holds an answer back until it is whole; a chat must not wait for that.
The application runs in a task that belongs to the response; closing the response hangs up on it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import cast

import httpx
from starlette.types import ASGIApp, Message

__all__ = ["AppTransport"]

_PARTS_MAX = 64


class AppTransport(httpx.AsyncBaseTransport):
    """Requests to an ASGI application without any socket; it sees a client without address."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Give the request to the application; returns when the head of its answer is there."""
        async with AsyncExitStack() as stack:
            call = await stack.enter_async_context(_called(self._app, request))
            head = await call.parts.get()
            if head is not None and head["type"] == "http.response.start":
                body = _Body(call, stack.pop_all())
                return httpx.Response(head["status"], headers=head["headers"], stream=body)
        raise httpx.RemoteProtocolError("The application gave no answer.", request=request)


class _Call:
    """One request in the application's hands."""

    def __init__(self, request: httpx.Request) -> None:
        self.request = request
        self.parts: asyncio.Queue[Message | None] = asyncio.Queue(_PARTS_MAX)
        self.left = asyncio.Event()
        self._asked = False

    async def receive(self) -> Message:
        """The request's body, and later the client's leaving."""
        if not self._asked:
            self._asked = True
            content = await self.request.aread()
            return {"type": "http.request", "body": content, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """A part of the answer; waits while the client is slow to read."""
        if self.left.is_set():
            raise OSError("The client has left.")
        await self.parts.put(message)

    async def finish(self) -> None:
        """The application is done; whoever still reads learns that nothing more comes."""
        if not self.left.is_set():
            await self.parts.put(None)

    def leave(self) -> None:
        """The client reads no more: whoever waits to send goes on, and then learns it."""
        self.left.set()
        while not self.parts.empty():
            self.parts.get_nowait()


class _Body(httpx.AsyncByteStream):
    """The parts of an answer as they come."""

    def __init__(self, call: _Call, stack: AsyncExitStack) -> None:
        self._call = call
        self._stack = stack

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (part := await self._call.parts.get()) is not None:
            if part.get("body"):
                yield cast("bytes", part["body"])
            if not part.get("more_body", False):
                return

    async def aclose(self) -> None:
        await self._stack.aclose()


@asynccontextmanager
async def _called(app: ASGIApp, request: httpx.Request) -> AsyncGenerator[_Call]:
    """Run the application on the request in a task group of its own until the answer is closed."""
    call = _Call(request)
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": request.url.scheme,
        "path": request.url.path,
        "raw_path": request.url.raw_path.partition(b"?")[0],
        "query_string": request.url.query,
        "root_path": "",
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
        "server": ("anser.sock", None),  # as on the Unix socket: its owner asks
        "client": None,
    }

    async def work() -> None:
        await app(scope, call.receive, call.send)
        await call.finish()

    async with asyncio.TaskGroup() as group:
        group.create_task(work())
        try:
            yield call
        finally:
            call.leave()
