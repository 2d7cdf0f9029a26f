"""Streamed answers, asked for and read over plain sockets: cheap enough for hundreds at once.

async with Stream.asked(server, max_tokens=3) as stream:
    assert await stream.status() == 200
    await stream.event()  # the first event's payload
    await stream.rest()   # all payloads, "[DONE]" the last
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from anser.adapters.sqlite import SqliteStore
from anser.core.ledger import Receipt
from tests.hostile import SSE_HEAD, Talk, delta, event
from tests.outside import CHAT, HELLO, listed
from tests.server import Server

__all__ = [
    "WAIT_S",
    "Gate",
    "Peer",
    "Stream",
    "crowd",
    "gated",
    "get",
    "idlers",
    "kept_receipts",
    "soon",
]

Peer = tuple[asyncio.StreamReader, asyncio.StreamWriter]
"""A plain connection."""

WAIT_S = 30.0  # for any one thing; nothing here takes long


@dataclass(slots=True)
class Stream:
    """One request on a connection of its own, and what has come of its answer."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    headers: dict[str, str] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    _status: int = 0

    @classmethod
    @asynccontextmanager
    async def asked(
        cls, server: Server, *, key: str | None = None, **fields: Any
    ) -> AsyncGenerator[Stream]:
        """As `ask`; hang up at the end."""
        stream = await cls.ask(server, key=key, **fields)
        try:
            yield stream
        finally:
            await stream.leave()

    @classmethod
    async def ask(
        cls, server: Server, *, key: str | None = None, source: str | None = None, **fields: Any
    ) -> Stream:
        """Connect, from the address `source`, and ask for a streamed answer, with the server's key
        or another ("" is none).
        """
        local = None if source is None else (source, 0)
        async with asyncio.timeout(WAIT_S):
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", server.port, local_addr=local
            )
        body = json.dumps({**HELLO, "stream": True, **fields}).encode()
        lines = [f"POST {CHAT} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}"]
        lines += ["Content-Type: application/json"]
        key = server.key if key is None else key
        lines += [f"Authorization: Bearer {key}"] if key else []
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        return cls(reader, writer)

    @property
    def request(self) -> str:
        """The identifier under which its receipt is kept."""
        return self.headers["x-request-id"]

    @property
    def tokens(self) -> int:
        """How many events with text have come."""
        return sum('"content":"' in data and '"content":""' not in data for data in self.seen)

    @property
    def whole(self) -> bool:
        """Whether the answer came to its proper end."""
        return self.seen[-1:] == ["[DONE]"]

    async def status(self) -> int:
        """The head of the answer: its status."""
        if not self._status:
            async with asyncio.timeout(WAIT_S):
                head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.strip().split("\r\n")
            pairs = (line.split(": ", 1) for line in lines)
            self.headers = {name.lower(): value for name, value in pairs}
            self._status = int(first.split()[1])
        return self._status

    async def error(self) -> dict[str, Any]:
        """The error of an answer that is one."""
        assert await self.status() >= 400
        async with asyncio.timeout(WAIT_S):
            body = await self.reader.readexactly(int(self.headers["content-length"]))
        found: dict[str, Any] = json.loads(body)["error"]
        return found

    async def event(self) -> str | None:
        """The next event's payload; None when the stream has ended, or the connection is gone."""
        assert await self.status() == 200, await self.error()
        async with asyncio.timeout(WAIT_S):
            while not self.whole:
                try:
                    line = await self.reader.readline()
                except ConnectionError:
                    line = b""
                if not line:
                    return None
                if line.startswith(b"data: "):
                    self.seen.append(line[6:].decode().strip())
                    return self.seen[-1]
        return None

    async def begun(self) -> Stream:
        """Wait for the first token."""
        while not self.tokens:
            assert await self.event() is not None, self.seen
        return self

    async def rest(self) -> list[str]:
        """Read to the end; all payloads that have come."""
        while await self.event() is not None:
            pass
        return self.seen

    async def leave(self) -> None:
        """Hang up at once."""
        self.writer.transport.abort()
        await asyncio.sleep(0)  # let the loop close it


@asynccontextmanager
async def crowd(server: Server, count: int, **fields: Any) -> AsyncGenerator[list[Stream]]:
    """Ask for so many answers at once; hang up on all of them at the end."""
    async with AsyncExitStack() as stack:
        asking = (stack.enter_async_context(Stream.asked(server, **fields)) for _ in range(count))
        yield await soon(asking)


@asynccontextmanager
async def idlers(port: int, count: int, *, say: bytes = b"") -> AsyncGenerator[list[Peer]]:
    """So many connections that say no more than this; closed at the end."""
    peers: list[Peer] = await soon(asyncio.open_connection("127.0.0.1", port) for _ in range(count))
    try:
        for _, writer in peers:
            writer.write(say)
        yield peers
    finally:
        for _, writer in peers:
            writer.transport.abort()
        await asyncio.sleep(0)  # let the loop close them


class Gate:
    """A node whose answers give two tokens, and end only when it is opened."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()

    async def play(self, talk: Talk) -> None:
        """Answer one question."""
        await talk.say(SSE_HEAD, delta("a"), delta("b"))
        await self.opened.wait()
        await talk.say(delta("c"), delta(finish="stop"), delta(usage=3))
        await talk.say(event(b"[DONE]"), b"0\r\n\r\n")


@asynccontextmanager
async def gated(server: Server, *, slots: int) -> AsyncGenerator[Gate]:
    """A Gate as a node of the server."""
    gate = Gate()
    async with listed(server, gate.play, slots=slots):
        try:
            yield gate
        finally:
            gate.opened.set()


async def get(server: Server, path: str) -> httpx.Response:
    """Ask for `path` with a connection of its own."""
    async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as client:
        return await client.get(path)


async def soon(work: Iterable[Any]) -> list[Any]:
    """All results of awaitables that are waited for at once."""
    async with asyncio.timeout(2 * WAIT_S):
        return list(await asyncio.gather(*work))


async def kept_receipts(data_dir: Path) -> dict[str, Receipt]:
    """All receipts that a platform which has ended left in its data folder, by request."""
    async with SqliteStore.open(data_dir / "anser.db") as store:
        receipts = await store.recent(limit=100_000, member=None)
    return {receipt.request: receipt for receipt in receipts}
