"""The contract of the Engine port, on every adapter."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import time
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from anser.core.errors import AnserError, ContextTooLong, EngineError, EngineRefused
from anser.core.fleet import EngineKind
from anser.ports import Call, Engine, Route
from tests.contract.engines import MAKERS, MODEL

pytestmark = [pytest.mark.anyio, pytest.mark.engine]

SOON_S = 20.0  # generous: the machine may be busy; what hangs takes for ever


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """One loop for the module, so that each engine is loaded once."""
    return "asyncio"


@pytest.fixture(scope="module", params=MAKERS.keys())
async def engine(request: pytest.FixtureRequest) -> AsyncGenerator[Engine]:
    """Each engine in turn."""
    async with MAKERS[request.param]() as made:
        yield made


def chat(text: str = "Tell me about trees.", **fields: object) -> Call:
    body: dict[str, object] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 8,
        "n": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return Call(lease="lease-1", route=Route.CHAT, body={**body, **fields})


def completion(text: str = "The sky is", **fields: object) -> Call:
    body: dict[str, object] = {
        "model": MODEL,
        "prompt": text,
        "max_tokens": 8,
        "n": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return Call(lease="lease-2", route=Route.COMPLETIONS, body={**body, **fields})


def embedding(given: object) -> Call:
    return Call(lease="lease-3", route=Route.EMBEDDINGS, body={"model": MODEL, "input": given})


async def collect(engine: Engine, call: Call) -> list[dict[str, Any]]:
    """All chunks of an answer; each must be one line of JSON."""
    chunks: list[dict[str, Any]] = []
    async with asyncio.timeout(3 * SOON_S), engine.generate(call) as answer:
        async for data in answer:
            assert isinstance(data, bytes)
            assert b"\n" not in data
            chunks.append(json.loads(data))
    return chunks


def text_of(chunks: list[dict[str, Any]]) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(c["text"] if "text" in c else c["delta"].get("content") or "" for c in choices)


def finishes(chunks: list[dict[str, Any]]) -> list[str]:
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return [choice["finish_reason"] for choice in choices if choice["finish_reason"]]


async def test_inspect_names_the_model(engine: Engine) -> None:
    """An engine says what it is, which model it serves, how long a context, how many at once."""
    report = await engine.inspect()
    assert isinstance(report.kind, EngineKind)
    served = {model.name: model for model in report.models}
    assert 0 < (served[MODEL].context_tokens or 1_024) <= 2_048
    assert report.slots is None or report.slots >= 4


@pytest.mark.parametrize("make", [chat, completion])
async def test_an_answer_has_the_openai_shape(engine: Engine, make: Any) -> None:
    """Text, then exactly one finish, then one usage chunk without choices, then the end."""
    chunks = await collect(engine, make())
    assert {chunk["model"] for chunk in chunks} == {MODEL}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert text_of(chunks)
    assert len(finishes(chunks)) == 1
    usages = [chunk for chunk in chunks if chunk.get("usage")]
    assert usages == [chunks[-1]]
    assert chunks[-1]["choices"] == []
    assert finishes(chunks[-2:-1])
    usage = chunks[-1]["usage"]
    assert usage["prompt_tokens"] > 0
    assert 0 < usage["completion_tokens"] <= 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 0 <= usage["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"]


async def test_a_chat_answer_begins_with_the_role(engine: Engine) -> None:
    """OpenAI's clients take the role from the first chunk."""
    chunks = await collect(engine, chat(temperature=0))
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"


async def test_max_tokens_ends_an_answer(engine: Engine) -> None:
    """An answer that is cut says so, and its usage says how long it became."""
    for field in ("max_tokens", "max_completion_tokens"):
        chunks = await collect(engine, chat("Write a long story.", **{field: 3}))
        assert finishes(chunks) == ["length"]
        assert chunks[-1]["usage"]["completion_tokens"] == 3


async def test_the_same_prompt_again_is_cached(engine: Engine) -> None:
    """Tokens of the prompt that need not be computed again are reported."""
    text = " ".join(f"The number {index} comes after {index - 1}." for index in range(40))
    await collect(engine, chat(text))
    again = await collect(engine, chat(text))
    usage = again[-1]["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 64


async def test_answers_run_side_by_side(engine: Engine) -> None:
    """As many answers as slots run at once, each whole, and no chunk goes to another's reader."""
    calls = [
        dataclasses.replace(chat(f"Say something about the number {n}."), lease=f"side-{n}")
        for n in range(4)
    ]
    answers = await asyncio.gather(*(collect(engine, call) for call in calls))
    ids = [{chunk["id"] for chunk in chunks} for chunks in answers]
    assert all(len(each) == 1 for each in ids)
    assert len(set.union(*ids)) == 4
    assert all(len(finishes(chunks)) == 1 for chunks in answers)


async def test_all_slots_are_in_use_at_once(engine: Engine) -> None:
    """Four answers can all be open with their first chunk before any has ended."""
    opened = asyncio.Barrier(4)

    async def hold(number: int) -> None:
        async with engine.generate(chat(f"Count from {number}.", max_tokens=64)) as answer:
            await anext(answer)
            await opened.wait()

    async with asyncio.timeout(SOON_S), asyncio.TaskGroup() as tasks:
        for number in range(4):
            tasks.create_task(hold(number))


async def test_leaving_frees_the_slot(engine: Engine) -> None:
    """Leaving an answer after its first chunk aborts it: its slot can be used at once."""
    for _ in range(3):
        async with asyncio.TaskGroup() as tasks:
            for number in range(4):
                tasks.create_task(_leave_after(engine, 2, number))
    async with asyncio.timeout(SOON_S):
        assert finishes(await collect(engine, chat())) != []


async def _leave_after(engine: Engine, chunks: int, number: int) -> None:
    call = chat(f"Write a very long story, number {number}.", max_tokens=900)
    async with engine.generate(call) as answer:
        for _ in range(chunks):
            await anext(answer)
        left = time.monotonic()
    assert time.monotonic() - left < SOON_S / 4


async def test_leaving_before_the_first_chunk_frees_the_slot(engine: Engine) -> None:
    """An answer that nobody ever read is aborted as well."""
    for number in range(6):
        async with asyncio.timeout(SOON_S):
            async with engine.generate(chat(f"{number} " * 200, max_tokens=900)):
                pass
    assert await collect(engine, chat())


async def test_a_cancelled_task_frees_the_slot(engine: Engine) -> None:
    """Cancelling the task that reads an answer leaves it."""

    async def read() -> None:
        await collect(engine, chat("Write a very long story.", max_tokens=900))

    for _ in range(5):
        async with asyncio.TaskGroup() as tasks:
            reader = tasks.create_task(read())
            await asyncio.sleep(0.05)
            reader.cancel()
        assert reader.cancelled()
    assert await collect(engine, chat())


async def test_a_prompt_beyond_the_context_is_refused(engine: Engine) -> None:
    """A prompt that does not fit is the caller's fault and says so, before any chunk."""
    with pytest.raises((ContextTooLong, EngineRefused)) as caught:
        await collect(engine, chat("word " * 4_000))
    assert caught.value.status == 400


async def test_an_embedding_for_each_input(engine: Engine) -> None:
    """Vectors of one length come in the order of the inputs, with usage; like inputs are alike."""
    async with asyncio.timeout(SOON_S):
        answer = json.loads(await engine.embed(embedding(["a tree", "a stone", "a tree"])))
    assert answer["object"] == "list"
    assert [item["index"] for item in answer["data"]] == [0, 1, 2]
    first, second, third = (item["embedding"] for item in answer["data"])
    assert len(first) == len(second)
    assert first == pytest.approx(third, abs=1e-3)
    assert first != second
    assert math.hypot(*first) == pytest.approx(1.0, abs=1e-3)
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > 0


async def test_one_input_may_stand_alone(engine: Engine) -> None:
    """A text that is not in a list is one input."""
    async with asyncio.timeout(SOON_S):
        answer = json.loads(await engine.embed(embedding("a tree")))
    assert len(answer["data"]) == 1


@pytest.mark.parametrize("name", MAKERS.keys())
async def test_a_closed_engine_serves_nobody(name: str) -> None:
    """Closing twice is closing once; afterwards an engine's error comes, not a hang."""
    async with MAKERS[name]() as engine:
        await engine.aclose()
        await engine.aclose()
        async with asyncio.timeout(SOON_S):
            with pytest.raises(EngineError):
                await collect(engine, chat())
            with pytest.raises(EngineError):
                await engine.embed(embedding("a"))
            with pytest.raises(EngineError):
                await engine.inspect()


@pytest.mark.parametrize("name", MAKERS.keys())
async def test_closing_ends_what_runs(name: str) -> None:
    """Whoever reads while the engine closes is not left hanging."""
    async with MAKERS[name]() as engine:
        reading = asyncio.Event()

        async def read() -> None:
            async with engine.generate(chat("Write a long story.", max_tokens=900)) as answer:
                async for _ in answer:
                    reading.set()

        async with asyncio.timeout(SOON_S), asyncio.TaskGroup() as tasks:
            reader = tasks.create_task(_ended(read()))
            await reading.wait()
            await engine.aclose()
        assert reader.done()


async def _ended(reading: Any) -> None:
    with contextlib.suppress(AnserError):
        await reading
