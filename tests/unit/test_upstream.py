"""The pooled HTTP/1.1 client, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from anser.core.errors import ConnectTimeout, EngineBroken, EngineStalled, EngineUnreachable
from anser.wire.upstream import Bounds, Origin, Upstream
from tests.hostile import SSE_HEAD, Hostile, Talk, answer, chunked

pytestmark = pytest.mark.anyio

Script = Callable[[Talk], Awaitable[None]]


@asynccontextmanager
async def talking(
    script: Script, *, bounds: Bounds | None = None
) -> AsyncIterator[tuple[Hostile, Upstream]]:
    async with Hostile(script) as hostile:
        origin = Origin(scheme="http", host="127.0.0.1", port=hostile.port)
        upstream = Upstream(origin, bounds=bounds)
        try:
            yield hostile, upstream
            upstream.validate()
        finally:
            await upstream.aclose()


async def always(talk: Talk) -> None:
    while True:
        seen = await talk.request()
        await talk.say(answer(seen.path.encode() + b":" + seen.body))


def saying(*parts: bytes) -> Script:
    async def script(talk: Talk) -> None:
        await talk.request()
        await talk.say(*parts)
        await talk.gone()

    return script


async def get(upstream: Upstream, path: str = "/") -> tuple[int, bytes]:
    with await upstream.send("GET", path) as response:
        return response.status, await response.read(1 << 20)


async def test_a_request_reaches_the_upstream_as_written() -> None:
    """Method, path, own headers and body arrive; nothing else is added but host and framing."""
    async with talking(always) as (hostile, upstream):
        own = [("content-type", "application/json")]
        with await upstream.send("POST", "/v1/x?y=1", headers=own, body=b"{}") as response:
            assert await response.read(100) == b"/v1/x?y=1:{}"
        (seen,) = hostile.seen
        assert (seen.method, seen.path, seen.body) == ("POST", "/v1/x?y=1", b"{}")
        assert seen.headers == {
            "host": f"127.0.0.1:{hostile.port}",
            "accept-encoding": "identity",
            "content-type": "application/json",
            "content-length": "2",
        }


async def test_connections_are_kept_and_used_again() -> None:
    """One after the other, requests use one connection; at once, one each."""
    async with talking(always) as (hostile, upstream):
        for _ in range(3):
            assert (await get(upstream, "/a"))[0] == 200
        assert hostile.connections == 1
        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(get(upstream))
        assert hostile.connections == 4
        assert repr(upstream).endswith("open=4 idle=4 dialling=0>")


async def test_idle_connections_are_bounded_in_number() -> None:
    """No more connections are kept than the bound says."""
    async with talking(always, bounds=Bounds(idle_max=2)) as (_, upstream):
        async with asyncio.TaskGroup() as group:
            for _ in range(5):
                group.create_task(get(upstream))
        assert "idle=2" in repr(upstream)
        assert "open=2" in repr(upstream)


async def test_idle_connections_are_bounded_in_time() -> None:
    """A connection that has idled too long is not used again."""
    async with talking(always, bounds=Bounds(idle_s=0.05)) as (hostile, upstream):
        await get(upstream)
        await asyncio.sleep(0.1)
        await get(upstream)
        assert hostile.connections == 2


async def test_open_connections_are_bounded() -> None:
    """At the bound, one more request is refused at once."""

    async def slow(talk: Talk) -> None:
        await talk.request()
        await talk.gone()

    bounds = Bounds(connections_max=1)
    async with talking(slow, bounds=bounds) as (_, upstream), asyncio.TaskGroup() as group:
        first = group.create_task(upstream.send("GET", "/"))
        await asyncio.sleep(0.05)
        with pytest.raises(EngineUnreachable, match="as many connections"):
            await upstream.send("GET", "/")
        first.cancel()


async def test_a_stale_connection_is_replaced_once() -> None:
    """A kept connection that the upstream has dropped costs no request."""

    async def once(talk: Talk) -> None:
        seen = await talk.request()
        await talk.say(answer(seen.path.encode()))
        if talk.number == 1:
            await talk.request()  # drops the connection with the second request unanswered

    async with talking(once) as (hostile, upstream):
        assert (await get(upstream, "/1"))[1] == b"/1"
        assert (await get(upstream, "/2"))[1] == b"/2"
        assert [seen.path for seen in hostile.seen] == ["/1", "/2", "/2"]
        assert hostile.connections == 2


async def test_a_fresh_connection_is_not_tried_twice() -> None:
    """Only a reused connection may have been stale: a fresh one that fails is a failure."""

    async def mute(talk: Talk) -> None:
        await talk.request()

    async with talking(mute) as (hostile, upstream):
        with pytest.raises(EngineUnreachable, match="unanswered"):
            await get(upstream)
        assert hostile.connections == 1


async def test_a_begun_answer_is_never_asked_again() -> None:
    """Once a byte of an answer has come, the request is not repeated."""

    async def begins(talk: Talk) -> None:
        seen = await talk.request()
        await talk.say(answer(seen.path.encode()))
        await talk.request()
        await talk.say(b"HTTP/1.1 200")

    async with talking(begins) as (hostile, upstream):
        await get(upstream)
        with pytest.raises(EngineUnreachable):
            await get(upstream)
        assert hostile.connections == 1


async def test_connection_refused() -> None:
    """Nobody listens: unreachable, with the reason."""
    async with Hostile(always) as hostile:
        port = hostile.port
    upstream = Upstream(Origin(scheme="http", host="127.0.0.1", port=port))
    with pytest.raises(EngineUnreachable, match="refused"):
        await get(upstream)


async def test_unknown_host() -> None:
    """A name that does not resolve: unreachable, with the reason."""
    upstream = Upstream(Origin(scheme="http", host="no-such-host.invalid", port=80))
    with pytest.raises(EngineUnreachable, match="cannot be reached"):
        await get(upstream)
    endless = Upstream(Origin(scheme="http", host="a" * 70, port=80))
    with pytest.raises(EngineUnreachable, match="cannot be reached"):
        await get(endless)


async def test_dialling_can_be_given_up() -> None:
    """A dial that is cancelled, or takes too long, leaves no connection behind."""

    async def mute(talk: Talk) -> None:
        await talk.gone()  # accepts, and never answers the TLS hello

    async with Hostile(mute) as hostile:
        origin = Origin(scheme="https", host="127.0.0.1", port=hostile.port)
        upstream = Upstream(origin, bounds=Bounds(connect_timeout_s=0.1))
        with pytest.raises(ConnectTimeout, match="no connection within 0"):
            await get(upstream)
        patient = Upstream(origin)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(get(patient), 0.1)
        for each in (upstream, patient):
            assert repr(each).endswith("open=0 idle=0 dialling=0>")


async def test_silence_is_bounded() -> None:
    """An upstream that never answers is given up after the bound."""
    bounds = Bounds(silence_s=0.1)
    async with talking(saying(), bounds=bounds) as (_, upstream):
        with pytest.raises(EngineStalled):
            await get(upstream)
    async with talking(saying(SSE_HEAD, chunked(b"a")), bounds=bounds) as (_, upstream):
        with await upstream.send("GET", "/") as response:
            assert await anext(response) == b"a"
            await asyncio.sleep(0.25)  # a slow reader is no silence of the upstream
            with pytest.raises(EngineStalled):
                await anext(response)


async def test_leaving_early_cuts_the_connection_at_once() -> None:
    """The upstream sees the hang-up as soon as the reader has left."""
    gone = asyncio.Event()

    async def endless(talk: Talk) -> None:
        await talk.request()
        await talk.say(SSE_HEAD, chunked(b"a"))
        if await talk.gone():
            gone.set()

    async with talking(endless) as (_, upstream):
        with await upstream.send("GET", "/") as response:
            assert await anext(response) == b"a"
        async with asyncio.timeout(1):
            await gone.wait()
        assert "open=0" in repr(upstream)


async def test_cancelling_cuts_the_connection_at_once() -> None:
    """A reader that is cancelled, before the head or after it, hangs up."""
    gone = asyncio.Semaphore(0)

    async def script(talk: Talk) -> None:
        seen = await talk.request()
        if seen.path == "/body":
            await talk.say(SSE_HEAD)
        if await talk.gone():
            gone.release()

    async with talking(script) as (_, upstream):
        for path in ("/head", "/body"):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await get(upstream, path)
            async with asyncio.timeout(1):
                await gone.acquire()
        assert "open=0" in repr(upstream)


async def test_a_slow_reader_pauses_the_upstream() -> None:
    """What is unread stays bounded; nothing is lost when reading goes on."""
    sent = 0

    async def pouring(talk: Talk) -> None:
        nonlocal sent
        await talk.request()
        await talk.say(b"HTTP/1.1 200 OK\r\nContent-Length: 33554432\r\n\r\n")
        for _ in range(512):
            await talk.say(b"x" * 65_536)
            sent += 65_536

    async with talking(pouring, bounds=Bounds(buffer_bytes=65_536)) as (_, upstream):
        with await upstream.send("GET", "/") as response:
            await asyncio.sleep(0.3)
            assert sent < 33_554_432
            assert "unread=" in repr(response)
            assert int(repr(response).split("unread=")[1].split()[0]) <= 65_536 + 262_144
            assert len(await response.read(1 << 26)) == 33_554_432


async def test_finish_keeps_the_connection_when_the_end_comes_late() -> None:
    """A reader that knows the end of its data does not lose the connection over the framing."""

    async def late(talk: Talk) -> None:
        while True:
            await talk.request()
            await talk.say(SSE_HEAD, chunked(b"data: [DONE]\n\n"))
            await asyncio.sleep(0.05)
            await talk.say(chunked(b"\n"), b"0\r\n\r\n")

    async with talking(late) as (hostile, upstream):
        for _ in range(3):
            with await upstream.send("GET", "/") as response:
                assert await anext(response) == b"data: [DONE]\n\n"
                response.finish()
            await asyncio.sleep(0.1)
        assert hostile.connections == 1


async def test_finish_does_not_wait_for_ever() -> None:
    """A body that goes on after its end is cut off."""
    gone = asyncio.Event()

    async def endless(talk: Talk) -> None:
        await talk.request()
        await talk.say(SSE_HEAD, chunked(b"end"))
        while not gone.is_set():
            try:
                await talk.say(chunked(b"x" * 16_384))
            except ConnectionError:
                gone.set()

    async with talking(endless) as (_, upstream):
        with await upstream.send("GET", "/") as response:
            assert (await anext(response)).startswith(b"end")
            response.finish()
        async with asyncio.timeout(2):
            await gone.wait()


async def test_a_body_longer_than_the_reader_takes() -> None:
    """A whole body is read up to its limit and not one byte further."""
    async with talking(saying(answer(b"x" * 100))) as (_, upstream):
        with await upstream.send("GET", "/") as response:
            assert len(await response.read(100)) == 100
    async with talking(saying(answer(b"x" * 101))) as (_, upstream):
        response = await upstream.send("GET", "/")
        with pytest.raises(EngineBroken, match="more than 100"):
            await response.read(100)


async def test_interim_answers_are_passed_over() -> None:
    """A few 1xx answers may come before the real one."""
    interim = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    async with talking(saying(interim * 8 + answer(b"hi"))) as (_, upstream):
        with await upstream.send("GET", "/") as response:
            assert (response.header(b"link"), await response.read(9)) == (b"", b"hi")


async def test_a_connection_that_speaks_unasked_is_dropped() -> None:
    """Bytes on an idle connection are no answer to anything."""

    async def eager(talk: Talk) -> None:
        await talk.request()
        await talk.say(answer(b"1"))
        await asyncio.sleep(0.05)
        await talk.say(answer(b"forged"))

    async with talking(eager) as (hostile, upstream):
        assert (await get(upstream))[1] == b"1"
        await asyncio.sleep(0.1)
        assert (await get(upstream))[1] == b"1"
        assert hostile.connections == 2


async def test_a_second_answer_to_one_request_is_dropped() -> None:
    """Two answers for one request: the first counts, and the connection is not used again."""
    async with talking(saying(answer(b"1") + answer(b"forged"))) as (hostile, upstream):
        assert (await get(upstream))[1] == b"1"
        assert (await get(upstream))[1] == b"1"
        assert hostile.connections == 2


async def test_until_eof_is_told_to_the_reader() -> None:
    """A body without length ends with its connection; the reader is told that it is so."""

    async def bare(talk: Talk) -> None:
        await talk.request()
        await talk.say(b"HTTP/1.1 200 OK\r\n\r\n", b"all", b" of it")

    async with talking(bare) as (_, upstream):
        with await upstream.send("GET", "/") as response:
            assert response.until_eof
            assert await response.read(100) == b"all of it"


async def test_answers_end_when_the_pool_closes() -> None:
    """Closing the pool ends what is under way, and nothing new begins."""
    async with talking(saying(SSE_HEAD, chunked(b"a"))) as (_, upstream):
        with await upstream.send("GET", "/") as response:
            assert await anext(response) == b"a"
            await upstream.aclose()
            with pytest.raises(EngineUnreachable, match="closed"):
                await anext(response)
        with pytest.raises(EngineUnreachable, match="closed"):
            await upstream.send("GET", "/")
        await upstream.aclose()


@pytest.mark.parametrize(
    "header", [("x", "a\r\nx-evil: 1"), ("x\n", "a"), ("x", "a\x00"), ("x", "é")]
)
async def test_unclean_headers_are_never_sent(header: tuple[str, str]) -> None:
    """What could forge a second header is a broken invariant, not a request."""
    upstream = Upstream(Origin(scheme="http", host="127.0.0.1", port=1))
    with pytest.raises(AssertionError):
        await upstream.send("GET", "/", headers=[header])
    with pytest.raises(AssertionError):
        await upstream.send("GET", "/a b")
