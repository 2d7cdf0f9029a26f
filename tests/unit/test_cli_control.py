"""Asking a platform: its answers, its refusals with their own codes, and what is not a platform."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from anser.cli.common import Place
from anser.cli.control import Control, connect, over_socket, running, socket_of
from anser.cli.transport import AppTransport
from anser.config import Config
from anser.core.errors import AnserError, EngineBroken, InvalidField, Unavailable

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def answering(status: int, *parts: bytes) -> AsyncIterator[Control]:
    """A platform that answers everything with this."""

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": status, "headers": []})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body"})

    client = httpx.AsyncClient(transport=AppTransport(app), base_url="http://localhost")
    async with asyncio.timeout(10), client:
        yield Control(client, "socket")


@pytest.mark.parametrize(
    ("name", "value"),
    [("ALL_PROXY", "socks5://127.0.0.1:1"), ("SSL_CERT_FILE", "/no/such.pem")],
)
async def test_an_odd_environment_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """Proxies and certificates that cannot be used are told; the socket here needs neither."""
    monkeypatch.setenv(name, value)
    with pytest.raises(Unavailable, match=r"anser\.invalid"):
        async with connect(Place(url="https://anser.invalid")) as control:
            await control.ask("GET", "/v1/models")
    assert not await running(Config(data_dir=tmp_path))
    async with over_socket(Config(data_dir=tmp_path)) as control:
        assert control.where == "socket"


async def test_an_answer_is_its_json_object() -> None:
    """What is asked for is returned as it came, in however many parts."""
    async with answering(200, b'{"a": ', b"1}") as control:
        assert await control.ask("GET", "/x") == {"a": 1}


@pytest.mark.parametrize(
    ("status", "content"),
    [(200, b"<html>"), (200, b"[]"), (200, b""), (500, b"oops"), (404, b'{"detail": "x"}')],
)
async def test_what_is_no_platform_is_told_so(status: int, content: bytes) -> None:
    """An answer that no platform gives is told as such, with its status."""
    async with answering(status, content) as control:
        with pytest.raises(Unavailable, match=f"status {status}.*not an Anser"):
            await control.ask("GET", "/x")


async def test_a_refusal_keeps_its_own_code() -> None:
    """A refusal is raised with the message, code, type and param that the platform gave."""
    detail = {"message": "no", "code": "conflict", "type": "t", "param": "id"}
    async with answering(409, json.dumps({"error": detail}).encode()) as control:
        with pytest.raises(AnserError) as caught:
            await control.ask("POST", "/x", body={})
    error = caught.value
    assert (error.message, error.code, error.kind, error.param) == ("no", "conflict", "t", "id")
    assert error.status == 409


async def test_a_refused_key_is_told_with_the_way_to_give_one() -> None:
    """Where a key is missing or wrong, the message says how to give it."""
    detail = {"message": "no", "code": "invalid_api_key", "type": "t", "param": None}
    async with answering(401, json.dumps({"error": detail}).encode()) as control:
        with pytest.raises(AnserError, match="ANSER_API_KEY"):
            await control.ask("GET", "/x")


async def test_an_endless_answer_is_cut_off() -> None:
    """What is longer than any answer of a platform is not read to its end."""
    async with answering(200, *[b"x" * 2**20] * 70) as control:
        with pytest.raises(Unavailable):
            await control.ask("GET", "/x")


async def events(*parts: bytes) -> list[dict[str, Any]]:
    """The events that a streamed answer of these parts gives."""
    async with answering(200, *parts) as control, control.stream("/x", {}) as stream:
        return [event async for event in stream]


async def test_a_stream_is_its_events_up_to_done() -> None:
    """Events come one by one, comments are passed over, and nothing follows [DONE]."""
    parts = (b': hi\n\ndata: {"a": 1}\n', b'\ndata: {"a": 2}\n\ndata: [DONE]\n\ndata: {"a": 3}\n\n')
    assert await events(*parts) == [{"a": 1}, {"a": 2}]


async def test_an_error_in_a_stream_is_raised() -> None:
    """An error event in mid-stream is raised with its own code."""
    detail = {"message": "lost", "code": "engine_error", "type": "t", "param": None}
    content = b'data: {"a": 1}\n\ndata: ' + json.dumps({"error": detail}).encode() + b"\n\n"
    with pytest.raises(AnserError, match="lost") as caught:
        await events(content)
    assert caught.value.code == "engine_error"


async def test_a_stream_that_is_refused_is_raised() -> None:
    """A refusal instead of a stream is raised like any other."""
    detail = {"message": "no", "code": "c", "type": "t", "param": None}
    async with answering(429, json.dumps({"error": detail}).encode()) as control:
        with pytest.raises(AnserError, match="no"):
            async with control.stream("/x", {}):
                pytest.fail("there is no stream")


@pytest.mark.parametrize("content", [b"data: nonsense\n\n", b"data: []\n\n"])
async def test_a_stream_of_something_else_is_told_so(content: bytes) -> None:
    """Events that are no JSON objects are not a platform's."""
    with pytest.raises(Unavailable):
        await events(content)


async def test_a_line_without_end_is_cut_off() -> None:
    """A stream cannot fill the memory with one line."""
    with pytest.raises(EngineBroken):
        await events(b"data: ", *[b"x" * 2**18] * 8)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "127.0.0.1:1", "ftp://x", "http://[::1", ""])
async def test_an_address_that_cannot_be_asked_is_named(url: str) -> None:
    """An address where nothing listens, or that is none, is in the message."""
    place = Place(url=url or "http://", key="k")
    with pytest.raises(Unavailable) as caught:
        async with connect(place) as control:
            await control.ask("GET", "/x")
    assert "--url" in caught.value.message


@pytest.mark.parametrize("key", ["é", "a\nb", "\x00", "\ud800"])
async def test_a_key_that_no_head_can_hold_is_refused(key: str) -> None:
    """A key with other than printable ASCII letters is refused before anything is sent."""
    with pytest.raises(InvalidField, match="ANSER_API_KEY"):
        async with connect(Place(url="http://127.0.0.1:1", key=key)):
            pytest.fail("it was taken")


async def test_a_socket_left_behind_is_no_platform(tmp_path: Path) -> None:
    """A socket file that nobody listens on, another kind of file, and none: nothing runs."""
    config = Config(data_dir=tmp_path)
    assert not await running(config)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(socket_of(config)))
    assert not await running(config)
    socket_of(config).unlink()
    socket_of(config).write_text("")
    assert not await running(config)
