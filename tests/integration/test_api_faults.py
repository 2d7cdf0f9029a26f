"""What must not hurt the API: bodies, fields and models, over real sockets.

The platform is `anser serve` without an engine of its own; where an answer is needed, a scripted
upstream is listed as its node, which also shows what does and does not reach an engine.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from anser.core.limits import ECHO_CHARS_MAX
from tests.hostile import Hostile, Talk
from tests.outside import CHAT, HELLO, asked, error_of, head, node, talk
from tests.server import Server, serving
from tests.unit.test_decode import NOT_JSON

pytestmark = pytest.mark.anyio

BODY_BYTES_MAX = 200_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A platform that wants a key, with small limits."""
    environment = {
        "ANSER_MEMBERS_ANONYMOUS": "off",
        "ANSER_SERVER_BODY_BYTES_MAX": str(BODY_BYTES_MAX),
        "ANSER_SERVER_BODY_TIMEOUT_S": "1",
    }
    folder = tmp_path_factory.mktemp("faults") / "data"
    with serving(folder, "--no-engine", environment=environment) as running:
        yield running


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    """A plain HTTP client with the key."""
    headers = {"authorization": f"Bearer {server.key}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=20) as client:
        yield client


# Bodies: too large, too slow, in another encoding (4, 5, 6)


def test_a_body_too_large_by_length_is_refused_before_it_is_read(server: Server) -> None:
    """A length over the limit is 413 at once; at the limit it is read."""
    length = f"Content-Length: {BODY_BYTES_MAX + 1}"
    status, error = error_of(talk(server, head(server, length)))
    assert (status, error["code"]) == (413, "body_too_large")
    body = json.dumps({"model": "x" * 300}).encode().ljust(BODY_BYTES_MAX)
    status, error = error_of(talk(server, head(server, f"Content-Length: {len(body)}"), body))
    assert (status, error["param"]) == (400, "model")


def test_a_body_too_large_in_chunks_is_refused_at_the_limit(server: Server) -> None:
    """Chunks are counted as they come; the last byte over the limit is 413."""
    start = head(server, "Transfer-Encoding: chunked")
    chunk = b"%x\r\n%b\r\n" % (10_000, b" " * 10_000)
    end = b"0\r\n\r\n"
    status, _ = error_of(talk(server, start, chunk * (BODY_BYTES_MAX // 10_000), end))
    assert status == 400
    more = chunk * (BODY_BYTES_MAX // 10_000) + b"1\r\n \r\n"
    status, _ = error_of(talk(server, start, more, end))
    assert status == 413


def test_expectations_are_honoured(server: Server) -> None:
    """`Expect: 100-continue` is answered before the body is, and not for one that is too large."""
    body = b'{"model": ""}'
    length = f"Content-Length: {len(body)}"
    received = talk(server, head(server, length, "Expect: 100-continue"), body)
    assert received.startswith(b"HTTP/1.1 100 ")
    assert b"HTTP/1.1 400 " in received
    length = f"Content-Length: {BODY_BYTES_MAX + 1}"
    received = talk(server, head(server, length, "Expect: 100-continue"))
    assert received.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "framing", ["Content-Length: 1000", "Transfer-Encoding: chunked"], ids=["length", "chunks"]
)
def test_a_body_that_stops_half_way_is_408(server: Server, framing: str) -> None:
    """A body that does not arrive in time is 408, the connection is closed, nothing is held."""
    before = time.monotonic()
    status, error = error_of(talk(server, head(server, framing), b"5\r\n"))
    assert (status, error["code"]) == (408, "body_timeout")
    assert time.monotonic() - before < 5
    assert server.pool()["running"] == server.pool()["queued"] == 0


def test_a_trickled_body_is_408(server: Server) -> None:
    """One byte now and then does not keep a body alive beyond its time."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        sock.sendall(head(server, "Content-Length: 1000"))
        before = time.monotonic()
        sock.settimeout(0.2)
        received = b""
        while not received and time.monotonic() - before < 8:
            try:
                received = sock.recv(4_096)
            except TimeoutError:
                sock.sendall(b" ")
    assert b" 408 " in received
    assert time.monotonic() - before < 4


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "zstd", "gzip, gzip", "x"])
def test_an_encoded_body_is_415(http: httpx.Client, encoding: str) -> None:
    """Nothing is decompressed, so nothing can expand a thousand-fold."""
    bomb = gzip.compress(b" " * 10_000_000)
    response = http.post(CHAT, content=bomb, headers={"content-encoding": encoding})
    assert response.status_code == 415


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "text/json"])
def test_a_body_that_is_not_declared_json_is_415(http: httpx.Client, kind: str) -> None:
    """A form or a plain text, which any page could make a browser send, is not read."""
    response = http.post(CHAT, content=json.dumps(HELLO), headers={"content-type": kind})
    assert response.status_code == 415


def test_a_body_that_is_not_declared_at_all_is_415(http: httpx.Client) -> None:
    """Nor is a body without a type, which any page could make a browser send as a blob."""
    response = http.post(CHAT, content=json.dumps(HELLO).encode())
    assert "content-type" not in response.request.headers
    assert response.status_code == 415


# Bodies: not JSON, hostile JSON (7)


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_what_is_not_json_is_400(http: httpx.Client, body: bytes) -> None:
    """Every hostile body gets the envelope, quickly."""
    before = time.monotonic()
    response = http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert time.monotonic() - before < 2


def test_little_of_a_body_is_echoed(http: httpx.Client) -> None:
    """A model's name of 100 kB is named as the field, and not repeated."""
    response = http.post(CHAT, json={**HELLO, "model": "\x1b[31m" * 10_000})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "model"
    assert len(response.content) < 4 * ECHO_CHARS_MAX


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 2**63}, "max_tokens"),
    ({"n": 10**6}, "n"),
    ({"stop": ["x"] * 10**4}, "stop"),
    ({"temperature": "hot"}, "temperature"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}] * 10**3}, "tools"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"priority": -100}, "priority"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"top_logprobs": 5}, "top_logprobs"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=[param for _, param in WRONG])
async def test_wrong_fields_never_reach_an_engine(
    server: Server, http: httpx.Client, fields: dict[str, Any], param: str
) -> None:
    """A wrong type, range or name is 400 with its path, and no engine hears of it (8)."""
    async with node(server) as upstream:
        response = await asyncio.to_thread(http.post, CHAT, json={**HELLO, **fields})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param
        assert asked(upstream) == []


async def test_an_engine_sees_checked_fields_only(server: Server, http: httpx.Client) -> None:
    """Of all that a caller may write, an engine gets what shapes the answer and nothing else."""
    fields: dict[str, Any] = {
        "temperature": 0.5,
        "top_k": 3,
        "seed": 5,
        "stop": ["x"],
        "logit_bias": {"7": 1},
        "user": "u",
        "service_tier": "priority",
        "prompt_cache_key": "k",
        "metadata": {"a": "b"},
        "store": True,
        "max_completion_tokens": 9,
        "stream_options": None,
    }
    async with node(server) as upstream:
        response = await asyncio.to_thread(http.post, CHAT, json={**HELLO, **fields})
        assert response.status_code == 200
        (seen,) = asked(upstream)
    assert seen == {
        **HELLO,
        "temperature": 0.5,
        "top_k": 3,
        "seed": 5,
        "stop": ["x"],
        "logit_bias": {"7": 1},
        "max_tokens": 9,
        "n": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def test_unknown_fields_are_dropped_where_the_operator_says_so(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """With `gateway.unknown_fields = "drop"` they are taken out, and still reach no engine."""
    folder = tmp_path_factory.mktemp("drop") / "data"
    environment = {"ANSER_GATEWAY_UNKNOWN_FIELDS": "drop"}
    with serving(folder, "--no-engine", environment=environment) as server:
        body = {**HELLO, "priority": 1, "mirostat": 1, "max_tokens": 5}
        body["messages"] = [{**HELLO["messages"][0], "cache_control": {}}]
        async with node(server) as upstream:
            response = await asyncio.to_thread(httpx.post, server.url + CHAT, json=body)
            assert response.status_code == 200
            (seen,) = asked(upstream)
    assert seen.keys() == {"model", "messages", "max_tokens", "n", "stream", "stream_options"}
    assert seen["messages"] == HELLO["messages"]


# Models and their context (9, 54)


async def test_an_unknown_model_is_404_with_near_names(server: Server, http: httpx.Client) -> None:
    """A typing error is answered with what may have been meant."""
    async with node(server):
        response = await asyncio.to_thread(http.post, CHAT, json={**HELLO, "model": "mm"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "Near names: m." in response.json()["error"]["message"]


async def test_a_model_without_a_node_is_503(server: Server, http: httpx.Client) -> None:
    """A model that exists while no node serves it is 503 with a time to come back."""
    async with node(server):
        (row,) = (await asyncio.to_thread(server.admin, "GET", "/nodes"))["nodes"]
        await asyncio.to_thread(server.admin, "POST", f"/nodes/{row['id']}/drain", {})
        response = await asyncio.to_thread(http.post, CHAT, json=HELLO)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "no_node"
    assert int(response.headers["retry-after"]) >= 1


async def test_certain_excess_of_context_is_told_before_dispatch(
    server: Server, http: httpx.Client
) -> None:
    """What cannot fit the model's context is 400 with the counts, and no engine is asked."""
    async with node(server, context=100) as upstream:
        for fields in (
            {"max_tokens": 101},
            {"messages": [{"role": "user", "content": "x" * 30_000}]},
        ):
            response = await asyncio.to_thread(http.post, CHAT, json={**HELLO, **fields})
            assert response.status_code == 400
            error = response.json()["error"]
            assert error["code"] == "context_length_exceeded"
            assert "maximum context length is 100 tokens" in error["message"]
        assert asked(upstream) == []


async def test_the_default_maximum_fits_the_context(server: Server, http: httpx.Client) -> None:
    """Where the caller names no maximum, the platform's is cut to what the context leaves."""
    async with node(server, context=100) as upstream:
        response = await asyncio.to_thread(http.post, CHAT, json=HELLO)
        assert response.status_code == 200
        (seen,) = asked(upstream)
    assert isinstance(seen["max_tokens"], int)
    assert 16 <= seen["max_tokens"] < 100


# Nothing is fetched (51), and others go on (52)


async def test_nothing_in_a_request_is_fetched(server: Server, http: httpx.Client) -> None:
    """Addresses in images, files, audio and schemas are refused, and nobody connects to them."""
    knocked = threading.Event()

    async def script(_: Talk) -> None:
        knocked.set()

    async with Hostile(script) as target, node(server) as upstream:
        url = f"{target.url}/x"
        schema = {"name": "s", "schema": {"$ref": url}}
        function = {"name": "f", "parameters": {"$ref": url}}
        wrong: list[dict[str, object]] = [
            {"response_format": {"type": "json_schema", "json_schema": schema}},
            {"tools": [{"type": "function", "function": function}]},
            {"tools": [{"type": "mcp", "server_url": url}]},
        ]
        for kind, name in (("image_url", "url"), ("input_audio", "data"), ("file", "file_url")):
            part = {"type": kind, kind: {name: url}}
            wrong.append({"messages": [{"role": "user", "content": [part]}]})
        for fields in wrong:
            response = await asyncio.to_thread(http.post, CHAT, json={**HELLO, **fields})
            assert response.status_code == 400, fields
        await asyncio.sleep(0.3)
        assert asked(upstream) == []
    assert not knocked.is_set()


def test_large_bodies_of_those_who_leave_hurt_nobody(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """While 30 clients send 5 MB and leave, others are answered within a second."""
    folder = tmp_path_factory.mktemp("leave") / "data"
    content = json.dumps({**HELLO, "messages": [{"role": "user", "content": '"{}\n' * 10**6}]})
    with serving(folder, "--no-engine") as server:

        def leave() -> None:
            with socket.create_connection(("127.0.0.1", server.port)) as sock:
                sock.sendall(head(server, f"Content-Length: {len(content)}") + content.encode())

        leavers = [threading.Thread(target=leave) for _ in range(30)]
        for leaver in leavers:
            leaver.start()
        slowest = 0.0
        with httpx.Client(base_url=server.url, timeout=20) as client:
            while any(leaver.is_alive() for leaver in leavers):
                before = time.monotonic()
                assert client.get("/health").status_code == 200
                slowest = max(slowest, time.monotonic() - before)
        assert slowest < 1.0
        assert server.pool()["queued"] == server.pool()["running"] == 0
