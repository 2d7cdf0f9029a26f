"""How long the stages of an answer may take, and its second lease, over real sockets (24).

The platform is `anser serve` without an engine of its own; scripted upstreams are its nodes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.hostile import SSE_HEAD, Talk, delta, stream
from tests.outside import CHAT, HELLO, asked, listed
from tests.server import Server, serving

pytestmark = pytest.mark.anyio

STREAM = {**HELLO, "stream": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A platform whose model `m` is in a hurry, and that hedges."""
    environment = {
        "ANSER_GATEWAY_MODEL_TIMEOUTS": "m first_token=0.3 gap=0.4 answer=2.5, calm answer=60",
        "ANSER_GATEWAY_HEDGE": "true",
    }
    folder = tmp_path_factory.mktemp("times") / "data"
    with serving(folder, "--no-engine", environment=environment) as running:
        yield running


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    """A plain HTTP client with the key."""
    headers = {"authorization": f"Bearer {server.key}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=20) as client:
        yield client


async def receipt(http: httpx.Client, response: httpx.Response) -> dict[str, Any]:
    """What is left of it."""
    path = f"/v1/receipts/{response.headers['x-request-id']}"
    found = await asyncio.to_thread(http.get, path)
    whole: dict[str, Any] = found.json()
    kept: dict[str, Any] = whole["receipt"]
    return kept


async def test_no_first_token_is_an_error_of_its_own(server: Server, http: httpx.Client) -> None:
    """Before a byte it has the status and code of its stage."""

    async def silent(talk: Talk) -> None:
        await talk.gone()

    async with listed(server, silent):
        response = await asyncio.to_thread(http.post, CHAT, json=HELLO)
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "first_token_timeout"


async def test_a_gap_is_an_error_event_of_its_own(server: Server, http: httpx.Client) -> None:
    """In mid-stream it is one well-formed event, and then the end."""

    async def stalls(talk: Talk) -> None:
        await talk.say(SSE_HEAD, delta("a"))
        await talk.gone()

    async with listed(server, stalls):
        response = await asyncio.to_thread(http.post, CHAT, json=STREAM)
    assert response.status_code == 200
    *_, last = response.text.strip().split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "token_gap_timeout"


@pytest.mark.parametrize("body", [HELLO, STREAM], ids=["whole", "streamed"])
async def test_an_answer_that_goes_on_and_on_is_ended(
    server: Server, http: httpx.Client, body: dict[str, Any]
) -> None:
    """Its engine sees the platform hang up; its client is told why; the receipt says it too."""

    async def drips(talk: Talk) -> None:
        await talk.say(SSE_HEAD)
        while not talk.reader.at_eof():
            await talk.say(delta("a"))
            await asyncio.sleep(0.1)

    async with listed(server, drips) as upstream:
        response = await asyncio.to_thread(http.post, CHAT, json=body)
        async with asyncio.timeout(5):
            await upstream.hung_up.wait()
        kept = await receipt(http, response)
    if body is HELLO:
        assert response.status_code == 504
        error = response.json()["error"]
    else:
        assert "[DONE]" not in response.text
        error = json.loads(response.text.strip().rpartition("\n\ndata: ")[2])["error"]
    assert error["code"] == "answer_timeout"
    assert (kept["outcome"], kept["error"]) == ("failed", "answer_timeout")
    assert len(kept["leases"]) == 1


async def test_a_late_first_token_is_asked_of_a_second_node(
    server: Server, http: httpx.Client
) -> None:
    """The node that hangs is not waited for, nor blamed; its receipt shows both leases."""
    hangs = asyncio.Event()

    async def first(talk: Talk) -> None:
        if hangs.is_set():
            await talk.gone()
        await talk.say(stream("one"))

    async def second(talk: Talk) -> None:
        await talk.say(stream("two"))

    async def ask() -> httpx.Response:
        return await asyncio.to_thread(http.post, CHAT, json={**HELLO, "model": "calm"})

    async with listed(server, first, slots=8, name="calm") as slow:
        for _ in range(25):
            assert (await ask()).json()["choices"][0]["message"]["content"] == "one"
        hangs.set()
        async with listed(server, second, slots=4, name="calm") as quick:
            response = await ask()
            assert response.json()["choices"][0]["message"]["content"] == "two"
            assert response.elapsed.total_seconds() < 5.0
            kept = await receipt(http, response)
            assert [lease["error"] for lease in kept["leases"]] == ["hedged", None]
            assert (len(asked(slow)), len(asked(quick))) == (26, 1)
            why = await asyncio.to_thread(http.get, f"/v1/why/{kept['request']}")
            assert [lease["hedge"] for lease in why.json()["leases"]] == [False, True]
            metrics = await asyncio.to_thread(http.get, "/metrics")
            assert "anser_hedged_total 1.0" in metrics.text
