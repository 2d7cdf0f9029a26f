"""One application behind two doors: by its fast lane, and by ASGI alone.

async with two_ways(stage) as ways:
    fast, plain = await ways.both(request)   # the raw answers, but for what differs each time
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncGenerator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Receive, Scope, Send

from anser.api.app import public_app
from anser.wire.doors import Door
from anser.wire.server import GuardSettings
from anser.wire.turn import FastLane, Turn, Visit, lane_of
from tests.stage import Stage

__all__ = ["CHAT", "LAST", "TEXT", "Ways", "request", "two_ways", "without_chance"]

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LAST = b"GET /nothing HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
"""A request after which the connection is closed."""
_WAIT_S = 20.0
_CHANCE = [
    (re.compile(rb"(?m)^date: [^\r]+"), b"date: -"),
    (re.compile(rb"(req_|chatcmpl-|cmpl-)[0-9a-f]{24}"), rb"\1-"),
    (re.compile(rb'"created":\d+'), b'"created":0'),
    (re.compile(rb"waited=[0-9.]+s"), b"waited=0s"),
]


def without_chance(answer: bytes) -> bytes:
    """Without dates and identifiers, which differ from answer to answer."""
    for pattern, instead in _CHANCE:
        answer = pattern.sub(instead, answer)
    return answer


def request(
    body: object = b"",
    path: str = CHAT,
    *lines: str,
    method: str = "POST",
    version: str = "1.1",
    kind: str | None = "application/json",
) -> bytes:
    """A request with this body; its length and type are given, if `lines` do not."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = [f"{method} {path} HTTP/{version}", "Host: a", *lines]
    if not any(line.lower().startswith(("content-length", "transfer-enc")) for line in lines):
        head.append(f"Content-Length: {len(data)}")
    if kind is not None:
        head.append(f"Content-Type: {kind}")
    return "\r\n".join([*head, "", ""]).encode() + data


class _Noting:
    """The lane, and what it has met."""

    def __init__(self, lane: FastLane) -> None:
        self._lane = lane
        self.targets = lane.targets
        self.body_bytes_max = lane.body_bytes_max
        self.met: list[Turn] = []

    def meet(self, turn: Turn) -> Visit:
        self.met.append(turn)
        return self._lane.meet(turn)


@dataclass(slots=True)
class _Noted:
    """The application with such a lane."""

    app: ASGIApp
    lane: _Noting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


@dataclass(slots=True)
class Ways:
    """The two ports, and what the fast lane has met."""

    noted: _Noted
    ports: dict[str, int] = field(default_factory=dict)
    doors: dict[str, Door] = field(default_factory=dict)

    @property
    def met(self) -> list[Turn]:
        """The turns that the lane has been shown, also those that it has declined."""
        return self.noted.lane.met

    async def both(self, *parts: bytes, pause_s: float = 0.01) -> tuple[bytes, bytes]:
        """What comes back on either way for bytes that are sent part by part, until it closes."""
        return await self.say("fast", *parts, pause_s=pause_s), await self.say(
            "plain", *parts, pause_s=pause_s
        )

    async def say(self, way: str, *parts: bytes, pause_s: float = 0.01) -> bytes:
        """The same on one way."""
        async with self.connected(way) as (reader, writer), asyncio.timeout(_WAIT_S):
            for part in parts:
                writer.write(part)
                if len(parts) > 1:
                    await asyncio.sleep(pause_s)
            return without_chance(await reader.read())

    @asynccontextmanager
    async def connected(
        self, way: str
    ) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A plain connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.ports[way])
        try:
            yield reader, writer
        finally:
            writer.transport.abort()
            with suppress(ConnectionError):
                await writer.wait_closed()


@asynccontextmanager
async def two_ways(stage: Stage, guard: GuardSettings | None = None) -> AsyncGenerator[Ways]:
    """Open both doors; they close quickly."""
    app = public_app(stage.services)
    lane = lane_of(app)
    assert lane is not None

    async def plain(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope, receive, send)

    ways = Ways(_Noted(app, _Noting(lane)))
    apps: dict[str, ASGIApp] = {"fast": ways.noted, "plain": plain}
    with ExitStack() as stack:
        for name, each in apps.items():
            sock = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            ways.ports[name] = sock.getsockname()[1]
            ways.doors[name] = Door(each, sock, guard or GuardSettings())
        async with asyncio.TaskGroup() as group:
            for door in ways.doors.values():
                group.create_task(door.serve())
                await door.opened.wait()
            try:
                yield ways
            finally:
                for door in ways.doors.values():
                    door.close(quickly=True)
