"""A canary in whatever is confidential is found in nothing that the platform writes or shows."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.hostile import SSE_HEAD, Talk, answer, chunked, delta, event, stream
from tests.outside import CHAT, HELLO, listed
from tests.server import Server, serving, serving_model
from tests.streams import WAIT_S, Stream

pytestmark = pytest.mark.anyio

CANARY = "TWEETY4711canary"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"


def forms(secret: str) -> Iterator[bytes]:
    """How the secret could be written: as it is, as hex, and as base64 at each alignment."""
    raw = secret.encode()
    yield raw
    yield raw.hex().encode()
    for skip in range(3):
        yield base64.b64encode(b"\0" * skip + raw)[4:-4]


class Watch:
    """Everything that a platform has written so far, and everything that it shows operators."""

    def __init__(self, server: Server, *folders: Path) -> None:
        self._server = server
        self._folders = folders

    def written(self) -> Iterator[tuple[str, bytes]]:
        """Its files but for models, its log, and what it has said on standard output."""
        for folder in self._folders:
            for file in folder.rglob("*"):
                if file.is_file() and "blobs" not in file.parts:
                    yield str(file), file.read_bytes()
        yield "standard error", self._server.log.read_bytes()
        said = [{**event, "key": None} for event in self._server.events]  # shown here and only here
        yield "standard output", json.dumps(said).encode()

    def shown(self, requests: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Metrics, state, usage, nodes, and the receipts of these requests."""
        transport = httpx.HTTPTransport(uds=self._server.socket, verify=False)
        with httpx.Client(transport=transport, base_url="http://anser", timeout=WAIT_S) as client:
            paths = ["/metrics", "/v1/pool", "/v1/models"]
            paths += [
                f"/admin/v1/{name}" for name in ("state", "usage", "nodes", "keys", "members")
            ]
            paths += [f"/admin/v1/receipts/{request}" for request in requests]
            for path in paths:
                found = client.get(path)
                assert found.status_code in (200, 404), (path, found.text)
                yield path, found.content


def found_in(places: Iterable[tuple[str, bytes]], *secrets: str) -> list[str]:
    """Where one of the secrets is, in any form."""
    wanted = [form for secret in secrets for form in forms(secret)]
    return [name for name, content in places if any(form in content for form in wanted)]


def new_key(server: Server) -> str:
    """A fresh key of the platform's owner."""
    body = {"member": "local/default/owner", "label": "canary"}
    key: str = server.admin("POST", "/keys", body)["key"]
    return key


def test_the_search_would_find_it() -> None:
    """The search finds a secret as text, hex and base64, wherever it begins."""
    for cover in (b"", b"a", b"ab", b"abc"):
        for hidden in (
            cover + CANARY.encode() + cover,
            (cover + CANARY.encode()).hex().encode(),
            base64.b64encode(cover + CANARY.encode() + cover),
        ):
            assert found_in([("place", hidden)], CANARY) == ["place"]
    assert found_in([("place", b"tweety")], CANARY) == []


def spoken() -> list[tuple[str, dict[str, Any]]]:
    """Questions with the canary wherever text can stand, most of them good, some of them not."""
    message = {"role": "user", "content": f"Remember {CANARY}, and repeat it."}
    named = {"name": f"find_{CANARY}", "parameters": {"type": "object", "properties": {}}}
    tool = {"type": "function", "function": {**named, "description": CANARY}}
    schema = {"name": CANARY, "schema": {"type": "object", "properties": {CANARY: {}}}}
    short = {"messages": [message], "max_tokens": 8}
    lines = f'^{CANARY}\n{{"event": "forged"}}\n\x1b]0;pwned\x07\\w$'
    odd = {"type": "object", "properties": {"a": {"type": "string", "pattern": lines}}}
    asks_odd = {"type": "function", "function": {"name": "f", "parameters": odd}}
    return [
        (CHAT, short),
        (CHAT, {**short, "stream": True, "stop": [CANARY], "user": CANARY}),
        (CHAT, {**short, "tools": [tool], "tool_choice": "required"}),
        (CHAT, {**short, "response_format": {"type": "json_schema", "json_schema": schema}}),
        (
            CHAT,
            {
                **short,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": odd},
                },
            },
        ),
        (CHAT, {**short, "tools": [asks_odd]}),
        (CHAT, {**short, "tools": [asks_odd], "tool_choice": "required"}),
        (CHAT, {**short, "messages": [{"role": CANARY, "content": CANARY}]}),
        (CHAT, {**short, CANARY: CANARY}),
        (CHAT, {**short, "temperature": CANARY}),
        (CHAT, {**short, "model": CANARY}),
        (CHAT, {**short, "messages": [{**message, "content": f"{CANARY} " * 3_000}]}),
        (COMPLETIONS, {"prompt": f"{CANARY} " * 3, "max_tokens": 4, "logprobs": 1}),
        (COMPLETIONS, {"prompt": CANARY, "max_tokens": 4, "n": 2, "suffix": CANARY}),
        (EMBEDDINGS, {"input": [CANARY, f"{CANARY} again"]}),
        (EMBEDDINGS, {"input": f"{CANARY} " * 3_000}),
    ]


@pytest.mark.engine
async def test_nothing_of_a_conversation_is_kept(tmp_path: Path) -> None:
    """Prompts, tools, stop words, answers and keys, in requests that end well, badly, half-way or
    not at all, leave nothing in logs, metrics, receipts or files, and a key not even its hash.
    """
    folder, scratch = tmp_path / "data", tmp_path / "scratch"
    scratch.mkdir()
    with serving_model(folder, environment={"TMPDIR": str(scratch)}) as server:
        watch, key, requests = Watch(server, folder, scratch), new_key(server), list[str]()
        headers = {"authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            for path, body in spoken():
                asked = {"model": server.model, **body}
                response = await client.post(path, json=asked, headers=headers)
                assert response.status_code < 500, response.text
                requests.append(response.headers["x-request-id"])
            for path, text in (
                (f"/{CANARY}?{CANARY}={CANARY}", b"{}"),
                (CHAT, b'{"' + CANARY.encode()),
            ):
                wrong = {"authorization": f"Bearer {CANARY}", "user-agent": CANARY}
                kind = {"content-type": "application/json"}
                for head in (wrong, headers):
                    response = await client.post(path, content=text, headers=head | kind)
                    assert response.is_client_error
        message = {"role": "user", "content": CANARY}
        async with Stream.asked(
            server, key=key, model=server.model, messages=[message], max_tokens=500
        ) as left:
            await left.begun()
        requests.append(left.request)
        secrets = (CANARY, key, hashlib.sha256(key.encode()).hexdigest(), server.key)
        assert found_in(watch.written(), *secrets) == []
        assert found_in(watch.shown(requests), *secrets) == []
        async with Stream.asked(
            server, key=key, model=server.model, messages=[message], max_tokens=500
        ) as running:
            await running.begun()
            server.process.send_signal(signal.SIGTERM)
            server.hear("stopping")
            server.process.send_signal(signal.SIGTERM)
            await running.rest()
        assert await asyncio.to_thread(server.process.wait, WAIT_S) == 0
    assert found_in(watch.written(), *secrets) == []


async def test_a_talkative_engine_is_not_quoted(tmp_path: Path) -> None:
    """Engines that repeat the prompt in their errors, before an answer and in mid-stream, cannot
    bring it into a log, a node's state, a metric or a receipt.
    """
    envelope = json.dumps({"error": {"message": CANARY, "type": CANARY, "code": CANARY}}).encode()
    odd = event(json.dumps({CANARY: CANARY, "error": {"message": CANARY}}).encode())
    lines = [
        answer(envelope, status="500 Internal Server Error"),
        answer(envelope, status="503 Service Unavailable"),
        answer(envelope, status="400 Bad Request"),
        answer(envelope, status="401 Unauthorized"),
        answer(envelope, status="429 Too Many Requests"),
        answer(CANARY.encode(), status=f"502 {CANARY}", kind=f"text/{CANARY}"),
        f"HTTP/1.1 200 OK\r\n{CANARY} {CANARY}\r\n\r\n".encode(),
        CANARY.encode(),
        SSE_HEAD + delta(CANARY) + odd,
        SSE_HEAD + delta(CANARY) + event(CANARY.encode()),
        SSE_HEAD + delta(CANARY) + chunked(f"event: {CANARY}\ndata: [{CANARY}\n\n".encode()),
        SSE_HEAD + delta(CANARY) + CANARY.encode(),
        stream(CANARY),
    ]
    impatient = {"ANSER_GATEWAY_QUEUE_TIMEOUT_S": "0.5"}
    with serving(tmp_path / "data", "--no-engine", environment=impatient) as server:
        watch, requests = Watch(server, tmp_path / "data"), list[str]()
        message = {"role": "user", "content": CANARY}
        for line in lines:

            async def play(talk: Talk, said: bytes = line) -> None:
                await talk.say(said)
                talk.writer.close()

            async with (
                listed(server, play),
                httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as client,
            ):
                for wish in (True, False):
                    body = {**HELLO, "messages": [message], "stream": wish}
                    response = await client.post(CHAT, json=body)
                    requests.append(response.headers["x-request-id"])
                assert found_in(watch.shown(requests), CANARY) == [], line
        assert found_in(watch.written(), CANARY) == []
    assert found_in(watch.written(), CANARY) == []
