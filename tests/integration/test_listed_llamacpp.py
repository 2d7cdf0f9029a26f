"""A real engine as a listed provider: llama.cpp's own HTTP server, found out and used."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator

import pytest

from anser.adapters.clock import SystemClock
from anser.adapters.engine_http import HttpEngine
from anser.adapters.memory import MemoryStore
from anser.config import GatewaySettings
from anser.core.errors import EngineError, EngineRefused, EngineUnreachable
from anser.core.fleet import EngineKind, Node
from anser.core.health import NodeState
from anser.ports import Call, Engine, Route
from anser.services.fleet import Fleet
from tests.llama_server import LlamaServer, llama_server

pytestmark = [pytest.mark.anyio, pytest.mark.engine]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """One loop for the module, so that the engine is loaded once."""
    return "asyncio"


@pytest.fixture(scope="module")
async def server() -> AsyncGenerator[LlamaServer]:
    """One server for all tests that leave it alive."""
    async with llama_server(alias="small", slots=2, context_tokens=1_024) as serving:
        yield serving


def chat(text: str, *, max_tokens: int = 8) -> Call:
    return Call(
        lease="r.1",
        route=Route.CHAT,
        body={
            "model": "small",
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens,
            "temperature": 0,  # or it may have nothing to say, and begin with its end
            "stream": True,
            "stream_options": {"include_usage": True},
            "n": 1,
        },
    )


async def outlive(engine: Engine, server: LlamaServer) -> None:
    """Read a long answer of a server that is killed in the middle of it."""
    async with engine.generate(chat("Tell a long story.", max_tokens=900)) as chunks:
        await anext(chunks)
        server.kill()
        async for _ in chunks:
            pass


async def test_it_is_found_out(server: LlamaServer) -> None:
    """Kind, model, context of a slot and number of slots are what it was started with."""
    for url in (server.url, f"{server.url}/v1", f"{server.url}/v1/"):
        engine = HttpEngine(Node(id="n", url=url))
        for _ in range(2):
            report = await engine.inspect()
            assert (report.kind, report.slots) == (EngineKind.LLAMACPP, 2)
            (model,) = report.models
            assert (model.name, model.context_tokens) == ("small", 1_024)
        await engine.aclose()


async def test_it_answers(server: LlamaServer) -> None:
    """Chunks of a chat, of a completion, and embeddings come through."""
    engine = HttpEngine(Node(id="n", url=server.url))
    async with engine.generate(chat("Say hello.")) as chunks:
        got = [json.loads(chunk) async for chunk in chunks]
    assert got[0]["choices"][0]["delta"]["role"] == "assistant"
    assert got[-1]["usage"]["completion_tokens"] > 0
    call = Call(
        lease="r.1",
        route=Route.COMPLETIONS,
        body={"model": "small", "prompt": "The sky is", "max_tokens": 4, "stream": True},
    )
    async with engine.generate(call) as chunks:
        texts = [each["text"] async for c in chunks for each in json.loads(c)["choices"]]
    assert "".join(texts)
    embed = Call(lease="r.1", route=Route.EMBEDDINGS, body={"model": "small", "input": "a tree"})
    assert len(json.loads(await engine.embed(embed))["data"][0]["embedding"]) == 576
    await engine.aclose()


async def test_its_refusals_are_the_requests_own(server: LlamaServer) -> None:
    """A prompt beyond its context is refused in its own words, not counted against it."""
    engine = HttpEngine(Node(id="n", url=server.url))
    with pytest.raises(EngineRefused, match="context") as caught:
        async with engine.generate(chat("word " * 3_000)) as chunks:
            await anext(chunks)
    assert caught.value.status == 400
    await engine.aclose()


async def test_leaving_frees_its_slots(server: LlamaServer) -> None:
    """Long answers that are left leave their slots to the next ones."""
    engine = HttpEngine(Node(id="n", url=server.url))
    for _ in range(4):
        async with engine.generate(chat("Tell a long story.", max_tokens=900)) as chunks:
            for _ in range(3):
                await anext(chunks)
    async with asyncio.timeout(20), engine.generate(chat("Hi")) as chunks:
        assert len([chunk async for chunk in chunks]) > 1
    await engine.aclose()


async def test_it_dies_and_comes_back_as_a_node() -> None:
    """A killed engine breaks its stream, is told as down, and its model still exists."""
    store, settings = MemoryStore(), GatewaySettings(probe_interval_s=0.1)
    fleet = Fleet(store, SystemClock(), settings, HttpEngine)
    async with llama_server(alias="small") as mortal, asyncio.TaskGroup() as group:
        status = await fleet.add(Node(id="mortal", url=mortal.url))
        assert (status.state, status.kind, status.slots) == (NodeState.UP, EngineKind.LLAMACPP, 2)
        running = group.create_task(fleet.run())
        engine = fleet.engine("mortal")
        down = asyncio.Event()
        fleet.subscribe(lambda change: None if getattr(change, "slots", 0) else down.set())
        with pytest.raises(EngineError) as caught:
            await outlive(engine, mortal)
        fleet.failed("mortal", caught.value)
        async with asyncio.timeout(20):
            await down.wait()
        assert fleet.status("mortal").state is NodeState.DOWN
        assert "refused" in (fleet.status("mortal").error or "")
        assert list(fleet.models()) == ["small"]
        with pytest.raises(EngineUnreachable):
            await engine.inspect()
        running.cancel()
    await fleet.aclose()
    fleet.validate()
