"""Talking to a platform from the outside: nodes that a test scripts, and bytes as they are."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from tests.hostile import Hostile, Script, Talk, answer, stream
from tests.server import Server

__all__ = ["CHAT", "HELLO", "asked", "error_of", "head", "listed", "node", "talk"]

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


@asynccontextmanager
async def node(server: Server, *, context: int | None = None) -> AsyncGenerator[Hostile]:
    """A node that serves the model `m` and says hello."""

    async def hello(talk: Talk) -> None:
        await talk.say(stream("hel", "lo"))

    async with listed(server, hello, context=context) as upstream:
        yield upstream


@asynccontextmanager
async def listed(
    server: Server,
    play: Script,
    *,
    context: int | None = None,
    slots: int = 2,
    name: str | None = None,
) -> AsyncGenerator[Hostile]:
    """A node that serves `m`, here called `name`; each question to it is answered by `play`."""

    async def script(talk: Talk) -> None:
        while True:
            request = await talk.request()
            row = {"id": "m", "object": "model", "owned_by": "vllm", "max_model_len": context}
            if request.method == "POST":
                await play(talk)
            elif request.path == "/v1/models":
                await talk.say(answer(json.dumps({"data": [row]}).encode()))
            else:
                await talk.say(answer(b"{}", status="404 Not Found"))

    async with Hostile(script) as upstream:
        body = {"url": upstream.url, "slots": slots, **({"model": name} if name else {})}
        added = await asyncio.to_thread(server.admin, "POST", "/nodes", body)
        try:
            yield upstream
        finally:
            if server.process.poll() is None:
                await asyncio.to_thread(server.admin, "DELETE", f"/nodes/{added['id']}")


def asked(upstream: Hostile) -> list[dict[str, object]]:
    """The bodies that an engine has been given."""
    return [seen.json for seen in upstream.seen if seen.method == "POST"]


def talk(server: Server, *parts: bytes, wait_s: float = 10.0) -> bytes:
    """Send these bytes as they are, then read until the platform closes or is silent."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=wait_s) as sock:
        for part in parts:
            sock.sendall(part)
        received = b""
        try:
            while data := sock.recv(65_536):
                received += data
                sock.settimeout(0.5)
        except (TimeoutError, ConnectionResetError):
            pass
        return received


def head(server: Server, *lines: str, path: str = CHAT) -> bytes:
    """The head of a POST with the key."""
    first = [f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {server.key}"]
    common = ["Content-Type: application/json", "Connection: close"]
    return "\r\n".join([*first, *common, *lines, "", ""]).encode()


def error_of(received: bytes) -> tuple[int, dict[str, Any]]:
    """Status and error of a raw answer."""
    top, _, body = received.partition(b"\r\n\r\n")
    assert b"x-request-id: req_" in top
    found: dict[str, Any] = json.loads(body)["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return int(top.split()[1]), found
