"""One HTTP request and its answer, on raw ASGI: what the hot path uses instead of a framework.

Theory of operation. An Exchange is read at most once (`read`), then watched (`watched`) while it
is answered: one companion task waits for the client's hang-up, on which whatever runs inside is
cancelled, and keeps a silent stream alive with comments. It is answered once, whole (`reply`) or
as a stream (`open`, `write`, `close`). An error before the answer has begun becomes a status and
an envelope; after that, the last event of the stream.

Who sends or reads too slowly is cut off below (wire/server.py), and has hung up as far as this
module can tell; what is left of a body that nobody reads is thrown away there, too.

Invariants: no byte is sent after `close`; the body is never held beyond its limit,
nor all of them beyond theirs.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anser.api import sse
from anser.api.auth import Header
from anser.api.context import Services
from anser.api.decode import decode_object
from anser.api.errors import Headers, body_of, headers_of, status_of
from anser.core.errors import AnserError, BodyTooLarge, Overloaded, UnsupportedEncoding
from anser.core.limits import BODIES_BYTES_MAX
from anser.services.members import Principal

__all__ = ["KEEP_ALIVE_S", "LARGE_BYTES", "Bodies", "Exchange", "HungUp", "check_head", "named"]

KEEP_ALIVE_S = 5.0  # a stream is silent for at most twice as long
LARGE_BYTES = 256 * 1024  # beyond this, decoding takes longer than others should wait
_DIGITS_MAX = 18
_JSON = (b"content-type", b"application/json")


def named(send: Send, request_id: str) -> Send:
    """`send`, with the request's identifier in the head of the answer."""

    async def with_name(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message["headers"], (b"x-request-id", request_id.encode())]
            message = {**message, "headers": headers}
        await send(message)

    return with_name


def check_head(header: Header, size_max: int) -> None:
    """Raise BodyTooLarge or UnsupportedEncoding for a body that is not read."""
    length = header(b"content-length") or ""
    if length.isdecimal() and (len(length) > _DIGITS_MAX or int(length) > size_max):
        raise BodyTooLarge(f"A body has at most {size_max} bytes.")
    encoding = header(b"content-encoding") or "identity"
    if encoding.lower() != "identity":
        raise UnsupportedEncoding("A body is read as it is: send it without content-encoding.")
    kind = (header(b"content-type") or "").partition(";")[0]
    if kind.strip().lower() != "application/json":
        raise UnsupportedEncoding("Send the body as 'content-type: application/json'.")


class HungUp(Exception):  # noqa: N818 - not an error: nobody is left to be told
    """The client has left, or was cut off."""


@dataclass(slots=True)
class Bodies:
    """The bytes of all bodies that are held: of requests that are read, wait or run."""

    most: int = BODIES_BYTES_MAX
    held: int = 0
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __repr__(self) -> str:
        return f"<Bodies {self.held}/{self.most} bytes>"

    def validate(self) -> None:
        """Assert the invariants: no request gives back more than it took."""
        assert 0 <= self.held <= self.most, self

    def take(self, size: int) -> None:
        """Hold so many more. Raises Overloaded."""
        if self.held + size > self.most:
            raise Overloaded("This platform holds as many requests as it can.", retry_after_s=1.0)
        self.held += size

    async def decode(self, body: bytes) -> dict[str, object]:
        """The JSON object in `body`; large ones one by one, off the loop. Raises RequestError."""
        if len(body) <= LARGE_BYTES:
            return decode_object(body)
        async with self._turn:
            return await asyncio.to_thread(decode_object, body)


class _State(Enum):
    WAITING = "waiting"
    STREAMING = "streaming"
    ANSWERED = "answered"


class Exchange:
    """One request: its head and body, and the one answer to it."""

    __slots__ = (
        "_bodies",
        "_receive",
        "_send",
        "_silent",
        "_size",
        "_state",
        "id",
        "principal",
        "scope",
        "services",
    )

    def __init__(
        self, services: Services, bodies: Bodies, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self.id = "req_" + secrets.token_hex(12)
        self.services = services
        self.scope = scope
        self.principal: Principal | None = None  # once it is known who asks
        self._bodies = bodies
        self._size = 0  # of the body, as far as it is held
        self._receive = receive
        self._send = send
        self._state = _State.WAITING
        self._silent = False

    def __repr__(self) -> str:
        return f"<Exchange {self.id} {self.scope['method']} {self._state.value}>"

    @property
    def bodiless(self) -> bool:
        """Whether the answer has a head only."""
        return bool(self.scope["method"] == "HEAD")

    def header(self, name: bytes) -> str | None:
        """The first header of this (lower-case) name."""
        for key, value in self.scope["headers"]:
            if key == name:
                text: str = value.decode("latin-1")
                return text
        return None

    # The body

    async def read(self) -> dict[str, object]:
        """The body's JSON object. Raises RequestError, Overloaded, HungUp."""
        size_max = self.services.config.server.body_bytes_max
        check_head(self.header, size_max)
        parts: list[bytes] = []
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise HungUp
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
            self._bodies.take(len(parts[-1]))
            self._size += len(parts[-1])
            if self._size > size_max:
                raise BodyTooLarge(f"A body has at most {size_max} bytes.")
        return await self._bodies.decode(parts[0] if len(parts) == 1 else b"".join(parts))

    def forget(self) -> None:
        """The request is over: its body is held no longer."""
        self._bodies.held -= self._size
        self._size = 0

    # The client's presence

    @asynccontextmanager
    async def watched(self) -> AsyncGenerator[None]:
        """Cancel what runs inside, once, as soon as the client hangs up."""
        failure: AnserError | None = None
        try:
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(self._watch())
                try:
                    yield
                except AnserError as error:
                    failure = error
                watch.cancel()
        except* HungUp:
            self._state = _State.ANSWERED
        if failure is not None:
            raise failure

    async def _watch(self) -> None:
        while True:
            try:
                async with asyncio.timeout(KEEP_ALIVE_S):
                    message = await self._receive()
            except TimeoutError:
                await self._keep_alive()
                continue
            if message["type"] == "http.disconnect":
                raise HungUp

    async def _keep_alive(self) -> None:
        if self._silent and self._state is _State.STREAMING:
            await self._put(sse.KEEP_ALIVE, more=True)
        self._silent = True

    # The answer

    async def reply(self, status: int, body: bytes, headers: Headers | None = None) -> None:
        """Answer with a whole JSON body."""
        length = (b"content-length", b"%d" % len(body))
        await self._start(status, [_JSON, length, *(headers or [])])
        await self._put(b"" if self.bodiless else body, more=False)

    async def empty(self, status: int, headers: Headers) -> None:
        """Answer with a head only."""
        await self._start(status, headers)
        await self._put(b"", more=False)

    async def delegate(self, response: ASGIApp) -> None:
        """Let an ASGI response answer."""
        assert self._state is _State.WAITING, self
        self._state = _State.ANSWERED
        await response(self.scope, self._receive, named(self._send, self.id))

    async def open(self, status: int, headers: Headers) -> None:
        """Begin an answer that is sent in parts."""
        await self._start(status, headers)
        self._state = _State.STREAMING

    async def write(self, data: bytes) -> None:
        """Send a part; waits while the client is slow to read."""
        self._silent = False
        await self._put(data, more=True)

    async def close(self, data: bytes = b"") -> None:
        """Send the last part."""
        await self._put(data, more=False)

    async def fail(self, error: AnserError, headers: Headers | None = None) -> None:
        """Tell the client what went wrong, in the place where it can still read it."""
        if self._state is _State.STREAMING:
            await self.close(sse.event(body_of(error)))
        elif self._state is _State.WAITING:
            told = [*headers_of(error), *(headers or [])]
            await self.reply(status_of(error), body_of(error), told)

    async def _start(self, status: int, headers: Headers) -> None:
        assert self._state is _State.WAITING, self
        self._state = _State.ANSWERED
        start = {"type": "http.response.start", "status": status, "headers": headers}
        await named(self._send, self.id)(start)

    async def _put(self, data: bytes, *, more: bool) -> None:
        if not more:
            self._state = _State.ANSWERED
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
