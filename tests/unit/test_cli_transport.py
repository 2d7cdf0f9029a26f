"""Asking an application in this process: it streams, it ends, and it learns that one has left."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anser.cli.transport import AppTransport

pytestmark = pytest.mark.anyio


def client(app: ASGIApp) -> httpx.AsyncClient:
    """A client of this application."""
    return httpx.AsyncClient(transport=AppTransport(app), base_url="http://localhost")


def head(status: int = 200) -> Message:
    """The beginning of an answer."""
    return {"type": "http.response.start", "status": status, "headers": [(b"x-a", b"b")]}


def part(body: bytes, *, more: bool) -> Message:
    """A part of an answer."""
    return {"type": "http.response.body", "body": body, "more_body": more}


async def test_a_request_arrives_as_it_was_sent() -> None:
    """Method, path, query, headers and body reach the application, as on the own socket."""
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)
        message = await receive()
        await send(head(201))
        await send(part(message["body"], more=False))

    async with client(app) as asking:
        answer = await asking.post("/a%2Fb", params={"q": "1"}, json={"x": 1})
    assert (answer.status_code, answer.headers["x-a"], answer.json()) == (201, "b", {"x": 1})
    scope = seen[0]
    assert (scope["method"], scope["path"], scope["raw_path"]) == ("POST", "/a/b", b"/a%2Fb")
    assert scope["query_string"] == b"q=1"
    assert scope["client"] is None
    assert scope["server"] == ("anser.sock", None)
    assert (b"content-type", b"application/json") in scope["headers"]


async def test_parts_come_while_the_answer_is_made() -> None:
    """A part is read before the next one is made: nothing is held back until the end."""
    read = asyncio.Event()

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send(head())
        await send(part(b"one", more=True))
        await read.wait()
        await send(part(b"two", more=False))

    got: list[bytes] = []
    async with asyncio.timeout(5), client(app) as asking, asking.stream("GET", "/") as answer:
        async for data in answer.aiter_raw():
            got.append(data)
            read.set()
    assert got == [b"one", b"two"]


async def test_who_leaves_early_is_noticed() -> None:
    """Closing an answer hangs up on the application, and waits until it has stopped."""
    ended: list[str] = []

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(head())
        await send(part(b"one", more=True))
        message = await receive()
        ended.append(message["type"])

    async with asyncio.timeout(5), client(app) as asking, asking.stream("GET", "/") as answer:
        assert await anext(answer.aiter_raw()) == b"one"
    assert ended == ["http.disconnect"]


async def test_a_sender_that_waits_for_a_reader_is_released() -> None:
    """An application that is ahead of its reader waits, and stops when the reader leaves."""
    sent: list[int] = []

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send(head())
        try:
            for number in range(10_000):
                await send(part(b"x", more=True))
                sent.append(number)
        except OSError:
            sent.append(-1)

    async with asyncio.timeout(5), client(app) as asking, asking.stream("GET", "/"):
        await asyncio.sleep(0.05)
        assert 10 < len(sent) < 200
    assert sent[-1] == -1


async def test_an_application_that_says_nothing_is_a_broken_one() -> None:
    """No answer is an error of the protocol, not an empty success."""

    async def app(_scope: Scope, receive: Receive, _send: Send) -> None:
        await receive()

    async with asyncio.timeout(5), client(app) as asking:
        with pytest.raises(httpx.RemoteProtocolError):
            await asking.get("/")


async def test_a_bug_in_the_application_is_not_hidden() -> None:
    """An exception of the application reaches the caller."""

    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise ZeroDivisionError

    async with asyncio.timeout(5), client(app) as asking:
        with pytest.raises(BaseExceptionGroup) as caught:
            await asking.get("/")
    assert caught.group_contains(ZeroDivisionError)
