"""A node dies in mid-answer, over real sockets: what a client sees of it, which is nothing."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest

from tests.hostile import SSE_HEAD, Talk, delta, event
from tests.outside import CHAT, HELLO, asked, listed
from tests.server import Server, serving

pytestmark = pytest.mark.anyio

WORDS = ["wild ", "geese ", "fly ", "far"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A platform without an engine of its own."""
    with serving(tmp_path_factory.mktemp("seam") / "data", "--no-engine") as running:
        yield running


@pytest.fixture
async def http(server: Server) -> AsyncGenerator[httpx.AsyncClient]:
    """A plain HTTP client with the key."""
    headers = {"authorization": f"Bearer {server.key}"}
    async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=20) as client:
        yield client


class Copyists:
    """Nodes that write `WORDS`, from wherever they are; so many answers die after two words."""

    def __init__(self, deaths: int) -> None:
        self.deaths = deaths

    async def play(self, talk: Talk) -> None:
        """Answer once."""
        body: dict[str, Any] = talk.seen[-1].json
        last = body["messages"][-1]
        at = len(last["content"].split()) if last["role"] == "assistant" else 0
        role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        await talk.say(SSE_HEAD, event(json.dumps({"choices": [role]}).encode()))
        for written, word in enumerate(WORDS[at:]):
            if written == 2 and self.deaths:
                self.deaths -= 1
                talk.reset()
                raise ConnectionResetError
            await talk.say(delta(word))
        await talk.say(delta(finish="stop"), delta(usage=len(WORDS) - at))
        await talk.say(event(b"[DONE]"), b"0\r\n\r\n")


@pytest.mark.parametrize("answers", [1, 2])
@pytest.mark.parametrize("streamed", [False, True])
async def test_a_client_sees_no_seam(
    server: Server, http: httpx.AsyncClient, answers: int, *, streamed: bool
) -> None:
    """Whole or streamed, one answer or several: the text, one role, one finish, one usage."""
    nodes = Copyists(deaths=answers)
    async with AsyncExitStack() as stack:
        upstreams = [await stack.enter_async_context(listed(server, nodes.play)) for _ in range(3)]
        more = {"stream_options": {"include_usage": True}} if streamed else {}
        body = {**HELLO, "n": answers, "stream": streamed, "max_tokens": 9, **more}
        response = await http.post(CHAT, json=body)
        engines_got = [body for upstream in upstreams for body in asked(upstream)]
    assert response.status_code == 200
    assert nodes.deaths == 0
    told = Told.streamed(response.text, answers) if streamed else Told.whole(response.json())
    assert told.texts == ["".join(WORDS)] * answers
    assert told.finishes == ["stop"] * answers
    assert told.roles == ["assistant"] * answers
    assert told.usage["completion_tokens"] == len(WORDS) * answers
    rest = [body for body in engines_got if body["messages"][-1]["role"] == "assistant"]
    assert [body["messages"][-1]["content"] for body in rest] == ["wild geese "] * answers
    assert all(body["max_tokens"] == 7 and body["continue_final_message"] for body in rest)


class Told:
    """What a client has been told, by choice."""

    def __init__(self, count: int) -> None:
        self.texts, self.roles, self.finishes = [""] * count, list[str](), list[str]()
        self.usage: dict[str, Any] = {}

    @classmethod
    def whole(cls, body: dict[str, Any]) -> Told:
        """Of an answer in one piece."""
        told = cls(len(body["choices"]))
        for choice in body["choices"]:
            told.texts[choice["index"]] = choice["message"]["content"]
            told.roles.append(choice["message"]["role"])
            told.finishes.append(choice["finish_reason"])
        told.usage = body["usage"]
        return told

    @classmethod
    def streamed(cls, text: str, count: int) -> Told:
        """Of a stream, which ends as it should."""
        told = cls(count)
        *lines, done = [line for line in text.splitlines() if line.startswith("data: ")]
        assert done == "data: [DONE]"
        for line in lines:
            chunk = json.loads(line.removeprefix("data: "))
            told.usage = chunk.get("usage") or told.usage
            for choice in chunk["choices"]:
                told.texts[choice["index"]] += choice["delta"].get("content") or ""
                told.roles += [choice["delta"]["role"]] if choice["delta"].get("role") else []
                told.finishes += [choice["finish_reason"]] if choice["finish_reason"] else []
        return told
