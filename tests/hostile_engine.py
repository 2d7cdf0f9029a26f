"""An HttpEngine in front of a hostile upstream, and what its answers come to."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from anser.adapters.engine_http import HttpEngine
from anser.core.errors import EngineError
from anser.core.fleet import Node
from anser.ports import Call, Route
from anser.wire.upstream import Bounds
from tests.hostile import Hostile, Talk

__all__ = ["CALL", "EMBED", "KEY", "chunks_of", "engine_for", "fault", "saying", "text_of"]

CALL = Call(
    lease="r.1",
    route=Route.CHAT,
    body={"model": "m", "messages": [{"role": "user", "content": "Hi"}], "stream": True},
)
EMBED = Call(lease="r.1", route=Route.EMBEDDINGS, body={"model": "m", "input": "Hi"})
KEY = "sk-secret-of-the-node"

Script = Callable[[Talk], Awaitable[None]]


@asynccontextmanager
async def engine_for(
    script: Script, *, key: str | None = KEY, bounds: Bounds | None = None
) -> AsyncGenerator[tuple[Hostile, HttpEngine]]:
    async with Hostile(script) as hostile:
        engine = HttpEngine(Node(id="n", url=hostile.url), key, bounds=bounds)
        try:
            yield hostile, engine
            engine.validate()
        finally:
            await engine.aclose()


def saying(*parts: bytes, stay: bool = False) -> Script:
    async def script(talk: Talk) -> None:
        await talk.request()
        await talk.say(*parts)
        if stay:
            await talk.gone()

    return script


async def chunks_of(engine: HttpEngine, into: list[bytes] | None = None) -> list[bytes]:
    got = [] if into is None else into
    async with engine.generate(CALL) as chunks:
        async for chunk in chunks:
            got.append(chunk)
    return got


def text_of(chunks: list[bytes]) -> str:
    pieces = [json.loads(chunk)["choices"] for chunk in chunks]
    return "".join(choices[0]["delta"].get("content", "") for choices in pieces if choices)


async def fault(*parts: bytes, stay: bool = True, silence_s: float = 20.0) -> EngineError:
    """The error that this answer leads to, in bounded time."""
    bounds = Bounds(silence_s=silence_s)
    async with engine_for(saying(*parts, stay=stay), bounds=bounds) as (_, engine):
        with pytest.raises(EngineError) as caught:
            await chunks_of(engine)
    return caught.value
