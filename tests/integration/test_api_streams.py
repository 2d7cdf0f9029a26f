"""Streams over real sockets: who leaves, who stalls, what breaks off, and what the receipt says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from anser.api.exchange import KEEP_ALIVE_S
from tests.hostile import SSE_HEAD, Talk, answer, chunked, delta, event, stream
from tests.outside import CHAT, HELLO, listed
from tests.server import Server, serving, wait_until

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A platform without an engine of its own, impatient with those who do not read."""
    environment = {
        "ANSER_SERVER_WRITE_TIMEOUT_S": "1",
        "ANSER_GATEWAY_TOKEN_GAP_TIMEOUT_S": "25",
    }
    folder = tmp_path_factory.mktemp("streams") / "data"
    with serving(folder, "--no-engine", environment=environment) as running:
        yield running


@pytest.fixture
async def http(server: Server) -> AsyncGenerator[httpx.AsyncClient]:
    """A plain HTTP client with the key."""
    headers = {"authorization": f"Bearer {server.key}"}
    async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=40) as client:
        yield client


@asynccontextmanager
async def streaming(http: httpx.AsyncClient, **fields: Any) -> AsyncGenerator[httpx.Response]:
    """A stream under way."""
    body = {**HELLO, "stream": True, **fields}
    async with http.stream("POST", CHAT, json=body) as response:
        yield response


async def events(response: httpx.Response) -> list[str]:
    """The rest of a stream, as its lines that are not empty."""
    return [line async for line in response.aiter_lines() if line]


async def settle(server: Server, request: str) -> dict[str, Any]:
    """The receipt of a request, once there is one; nothing of it runs on."""
    receipts: list[dict[str, Any]] = []

    def settled() -> bool:
        pool = server.pool()
        if pool["running"] or pool["queued"]:
            return False
        try:
            receipts.append(server.receipt(request))
        except AssertionError:
            return False
        return True

    await asyncio.to_thread(wait_until, settled, within_s=5)
    return receipts[-1]


async def endless(talk: Talk) -> None:
    """An answer that goes on until whoever reads it leaves."""
    await talk.say(SSE_HEAD)
    while True:
        await talk.say(delta("word "))
        await asyncio.sleep(0.02)


# The sound way


async def test_a_stream_has_the_shape_that_clients_read(
    server: Server, http: httpx.AsyncClient
) -> None:
    """Only data lines, the engine's choices as they came but for the role that this one leaves out,
    [DONE] last, and telling headers."""

    async def play(talk: Talk) -> None:
        await talk.say(stream("Hel", "lo"))

    async with listed(server, play) as upstream, streaming(http) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"
        assert response.headers["x-anser-node"] == f"127.0.0.1:{upstream.port}"
        lines = await events(response)
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    whole = stream("Hel", "lo").decode()
    choices = [line[line.index('"choices"') :] for line in lines[:-1]]
    assert choices[0].count('"role":"assistant",') == 1
    choices[0] = choices[0].replace('"role":"assistant",', "")
    assert [each in whole for each in choices] == [True] * 3
    assert not any("usage" in line for line in lines)


async def test_an_answer_has_one_name_whatever_its_engine_calls_it(
    server: Server, http: httpx.AsyncClient
) -> None:
    """Chunks and whole answers name the model that was asked for, and lead to their receipt."""

    async def play(talk: Talk) -> None:
        odd = {"id": "c9", "model": "m", "choices": [{"index": 7, "delta": {"content": "lo"}}]}
        empty = {"id": "c9", "model": "m", "prompt_filter_results": []}
        await talk.say(
            SSE_HEAD, delta("hel"), *(event(json.dumps(o).encode()) for o in (empty, odd))
        )
        await talk.say(delta(finish="stop"), delta(usage=2), event(b"[DONE]"), b"0\r\n\r\n")

    options = {"stream_options": {"include_usage": True}}
    async with listed(server, play, name="foo"):
        whole = (await http.post(CHAT, json={**HELLO, "model": "foo"})).json()
        async with streaming(http, model="foo", **options) as response:
            lines = await events(response)
        async with streaming(http, model="foo", n=2) as response:
            several = await events(response)
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert {chunk["model"] for chunk in [whole, *chunks]} == {"foo"}
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    assert [choice["index"] for chunk in chunks for choice in chunk["choices"]] == [0, 0, 0]
    for answer_id in (whole["id"], chunks[0]["id"]):
        kept = (await http.get(f"/v1/receipts/{answer_id}")).json()
        assert kept["receipt"]["model"] == "foo"
    assert several[-1] == "data: [DONE]"


async def test_nothing_in_an_answer_can_end_or_forge_an_event(
    server: Server, http: httpx.AsyncClient
) -> None:
    """Framing in a text, and lines and fields around it, reach a client as text or not at all."""
    text = 'a\n\ndata: [DONE]\n\ndata: {"error": {}}\r\revent: x\r\n: c\u2028\x00'
    forged = b'{"choices":[{"index":0,\ndata: "delta":{"content":"b"}}]}'

    async def play(talk: Talk) -> None:
        await talk.say(SSE_HEAD, delta(text), chunked(b"event: error\rid: 7\r\n: data: no\n\n"))
        await talk.say(event(forged), delta(finish="stop"), delta(usage=2))
        await talk.say(event(b"[DONE]"), delta("after"), b"0\r\n\r\n")

    async with listed(server, play):
        async with streaming(http) as response:
            raw = await response.aread()
        whole = (await http.post(CHAT, json=HELLO)).json()
    events = raw.decode().removesuffix("\n\n").split("\n\n")
    assert all(each.startswith("data: ") and each.count("\n") == 0 for each in events)
    assert b"\r" not in raw
    *chunks, done = (each.removeprefix("data: ") for each in events)
    assert done == "[DONE]"
    deltas = [json.loads(chunk)["choices"][0]["delta"] for chunk in chunks]
    assert "".join(each.get("content") or "" for each in deltas) == text + "b"
    assert whole["choices"][0]["message"]["content"] == text + "b"


async def test_usage_is_the_platforms_own_count(server: Server, http: httpx.AsyncClient) -> None:
    """An engine's impossible claim of usage is not passed on, even inside its last chunk."""

    async def play(talk: Talk) -> None:
        last = {
            "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 10**12, "completion_tokens": 10**12},
        }
        await talk.say(SSE_HEAD, delta("a"), delta("b"), event(json.dumps(last).encode()))
        await talk.say(event(b"[DONE]"), b"0\r\n\r\n")

    async with (
        listed(server, play),
        streaming(http, stream_options={"include_usage": True}) as response,
    ):
        lines = await events(response)
    *chunks, usage, done = (line.removeprefix("data: ") for line in lines)
    assert done == "[DONE]"
    assert not any("usage" in chunk for chunk in chunks)
    told = json.loads(usage)
    assert told["choices"] == []
    assert told["usage"]["completion_tokens"] == 2
    assert told["usage"]["prompt_tokens"] < 100


async def test_a_silent_engine_is_covered_by_comments(
    server: Server, http: httpx.AsyncClient
) -> None:
    """While an engine is silent the stream stays alive by SSE comments, which clients ignore."""

    async def play(talk: Talk) -> None:
        await talk.say(SSE_HEAD, delta("a"))
        await asyncio.sleep(2 * KEEP_ALIVE_S + 1)
        await talk.say(delta(finish="stop"), delta(usage=1), event(b"[DONE]"), b"0\r\n\r\n")

    async with listed(server, play), streaming(http) as response:
        lines = await events(response)
    assert lines[1].startswith(": ")
    assert [line for line in lines if not line.startswith(("data: {", ": "))] == ["data: [DONE]"]


# Breaking off


async def test_a_break_in_mid_stream_is_an_error_event(
    server: Server, http: httpx.AsyncClient
) -> None:
    """A node lost where none can go on ends the stream with an error, and without [DONE]."""
    form = {"type": "json_object"}

    async def play(talk: Talk) -> None:
        await talk.say(SSE_HEAD, delta("a"), delta("b"))
        talk.reset()

    async with listed(server, play), streaming(http, response_format=form) as response:
        assert response.status_code == 200
        lines = await events(response)
        request = response.headers["x-request-id"]
    error = json.loads(lines[-1].removeprefix("data: "))["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "data: [DONE]" not in lines
    receipt = await settle(server, request)
    assert receipt["outcome"] == "failed"
    assert receipt["error"] == error["code"]
    assert receipt["usage"]["completion_tokens"] == 2


async def test_a_failure_before_the_first_token_is_a_status(
    server: Server, http: httpx.AsyncClient
) -> None:
    """Before anything is sent, a failure is a plain HTTP error, also where a stream was asked."""

    async def play(talk: Talk) -> None:
        await talk.say(answer(b'{"error": {"message": "no"}}', status="500 Oops"))

    async with listed(server, play), streaming(http) as response:
        assert response.status_code == 502
        assert response.headers["content-type"] == "application/json"
        await response.aread()
        assert response.json()["error"]["code"] == "engine_broken"


async def test_an_engines_refusal_is_passed_on(server: Server, http: httpx.AsyncClient) -> None:
    """A request that an engine finds at fault is the caller's 4xx, in the envelope."""
    refusal = {
        "object": "error",
        "message": "This model's maximum context length is 8 tokens. However, you sent 9.",
        "type": "BadRequestError",
        "code": 400,
    }

    async def play(talk: Talk) -> None:
        await talk.say(answer(json.dumps(refusal).encode(), status="400 Bad Request"))

    async with listed(server, play):
        response = await http.post(CHAT, json=HELLO)
        again = await http.post(CHAT, json=HELLO)
    assert response.status_code == again.status_code == 400
    assert response.json()["error"]["message"] == refusal["message"]
    assert response.json()["error"]["code"] == "context_length_exceeded"


async def test_one_of_several_answers_that_fails_fails_all(
    server: Server, http: httpx.AsyncClient
) -> None:
    """With `n`, a lost node ends the whole with an honest error, and stops the others."""
    begun = asyncio.Event()

    async def play(talk: Talk) -> None:
        if talk.seen[-1].json.get("seed") == 8:
            await begun.wait()
            await talk.say(SSE_HEAD, delta("x"))
            talk.reset()
        else:
            begun.set()
            await endless(talk)

    async with listed(server, play) as upstream:
        async with streaming(http, n=2, seed=7) as response:
            lines = await events(response)
            request = response.headers["x-request-id"]
        assert "error" in json.loads(lines[-1].removeprefix("data: "))
        assert "data: [DONE]" not in lines
        async with asyncio.timeout(3):
            await upstream.hung_up.wait()
    outcomes = {(await settle(server, f"{request}-{index}"))["outcome"] for index in (0, 1)}
    assert outcomes == {"failed", "cancelled"}


# Who leaves, and who does not read: 13, 14


async def test_leaving_in_mid_stream_stops_the_engine(
    server: Server, http: httpx.AsyncClient
) -> None:
    """The engine's stream is closed within moments; the receipt has what was delivered."""
    async with listed(server, endless) as upstream:
        async with streaming(http) as response:
            request = response.headers["x-request-id"]
            seen = 0
            async for line in response.aiter_lines():
                seen += line.startswith("data: ")
                if seen == 5:
                    break
        async with asyncio.timeout(2):
            await upstream.hung_up.wait()
    receipt = await settle(server, request)
    assert receipt["outcome"] == "cancelled"
    assert 5 <= receipt["usage"]["completion_tokens"] <= 30


async def test_leaving_before_the_first_token_stops_the_engine(
    server: Server, http: httpx.AsyncClient
) -> None:
    """Who leaves while the engine still thinks costs no delivered token."""
    asked = asyncio.Event()
    left = asyncio.Event()

    async def play(talk: Talk) -> None:
        asked.set()
        assert await talk.gone()
        left.set()

    async with listed(server, play):
        task = asyncio.ensure_future(http.post(CHAT, json=HELLO))
        await asked.wait()
        task.cancel()
        async with asyncio.timeout(2):
            await left.wait()
        await asyncio.to_thread(wait_until, lambda: server.pool()["running"] == 0, within_s=2)


async def test_leaving_the_queue_asks_no_engine(server: Server, http: httpx.AsyncClient) -> None:
    """Who leaves while waiting is gone at once, and no engine ever hears of it."""
    release = asyncio.Event()

    async def play(talk: Talk) -> None:
        await release.wait()
        await talk.say(stream("a"))

    async with listed(server, play, slots=1) as upstream:
        first = asyncio.ensure_future(http.post(CHAT, json=HELLO))
        await asyncio.to_thread(wait_until, lambda: server.pool()["running"] == 1)
        waiting = [asyncio.ensure_future(http.post(CHAT, json=HELLO)) for _ in range(5)]
        await asyncio.to_thread(wait_until, lambda: server.pool()["queued"] == 5)
        for task in waiting:
            task.cancel()
        await asyncio.to_thread(wait_until, lambda: server.pool()["queued"] == 0, within_s=2)
        release.set()
        assert (await first).status_code == 200
        assert len([seen for seen in upstream.seen if seen.method == "POST"]) == 1


async def test_leaving_between_the_last_token_and_the_end(
    server: Server, http: httpx.AsyncClient
) -> None:
    """Who leaves when all is said, but the engine has not ended, has a receipt nonetheless."""
    said = asyncio.Event()

    async def play(talk: Talk) -> None:
        await talk.say(SSE_HEAD, delta("a"), delta("b"), delta(finish="stop"))
        said.set()
        await talk.gone()

    async with listed(server, play):
        async with streaming(http) as response:
            request = response.headers["x-request-id"]
            await said.wait()
            async for line in response.aiter_lines():
                if '"b"' in line:
                    break
        receipt = await settle(server, request)
    assert receipt["outcome"] == "cancelled"
    assert receipt["usage"]["completion_tokens"] == 2


async def test_who_does_not_read_is_cut_off(server: Server) -> None:
    """A client that stops reading slows its engine, and after the write timeout frees its slot."""
    sent = 0

    async def flood(talk: Talk) -> None:
        nonlocal sent
        await talk.say(SSE_HEAD)
        while True:
            await talk.say(delta("x" * 50_000))
            sent += 50_000

    async with listed(server, flood) as upstream:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1_024)
        body = json.dumps({**HELLO, "stream": True, "max_tokens": 10**6}).encode()
        lines = ["POST /v1/chat/completions HTTP/1.1", "Host: x", f"Content-Length: {len(body)}"]
        lines += ["Content-Type: application/json"]
        lines += [f"Authorization: Bearer {server.key}", "", ""]
        writer.write("\r\n".join(lines).encode() + body)
        assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        async with asyncio.timeout(10):
            await upstream.hung_up.wait()
        assert sent < 50_000_000
        await asyncio.to_thread(wait_until, lambda: server.pool()["running"] == 0, within_s=3)
        writer.transport.abort()
