"""What a hostile or broken engine may send, over a real socket, and what becomes of it."""

from __future__ import annotations

import asyncio
import json
import re

import pytest

from anser.adapters.engine_http import HttpEngine
from anser.core.errors import (
    ConnectTimeout,
    EngineBroken,
    EngineDeclined,
    EngineError,
    EngineRefused,
    EngineStalled,
    EngineUnreachable,
)
from anser.core.fleet import Node
from anser.core.limits import CHUNK_BYTES_MAX, ENGINE_HEAD_BYTES_MAX
from anser.wire.upstream import Bounds
from tests.hostile import SSE_HEAD, Hostile, Talk, chunked, delta, event, stream
from tests.hostile_engine import CALL, EMBED, KEY, chunks_of, engine_for, fault, saying, text_of

pytestmark = pytest.mark.anyio

# The sound way


async def test_chunks_come_through_as_they_were_sent() -> None:
    """Each event's JSON is passed on byte for byte; [DONE] and the framing are not."""
    whole = stream("Hel", "lo, ", "wörld")
    async with engine_for(saying(whole)) as (hostile, engine):
        chunks = await chunks_of(engine)
        assert text_of(chunks) == "Hello, wörld"
        assert len(chunks) == 5
        assert all(chunk in whole for chunk in chunks)
        assert not any(b"DONE" in chunk for chunk in chunks)
        (seen,) = hostile.seen
        assert (seen.method, seen.path) == ("POST", "/v1/chat/completions")
        assert seen.json == CALL.body


async def test_only_the_nodes_own_headers_reach_the_engine() -> None:
    """What the engine sees is the platform's: five headers, and the node's own key."""
    async with engine_for(saying(stream("a"))) as (hostile, engine):
        await chunks_of(engine)
        headers = dict(hostile.seen[0].headers)
        assert headers.pop("content-length")
        assert headers == {
            "host": f"127.0.0.1:{hostile.port}",
            "accept": "text/event-stream",
            "accept-encoding": "identity",
            "content-type": "application/json",
            "authorization": f"Bearer {KEY}",
        }


async def test_a_stream_split_at_every_byte() -> None:
    """However the bytes are split, the chunks are the same."""
    whole = stream("é", "\u2028", "x")
    parts = [whole[i : i + 1] for i in range(len(whole))]
    async with engine_for(saying(*parts)) as (_, engine):
        split = await chunks_of(engine)
    async with engine_for(saying(whole)) as (_, engine):
        assert split == await chunks_of(engine)


async def test_usage_that_comes_with_the_finish_is_told_after_it() -> None:
    """Engines that report both at once are read as if they had sent two chunks; one usage comes."""
    both = delta(finish="stop").replace(b'"choices"', b'"usage":{"prompt_tokens":1},"choices"')
    both = event(both.split(b"data: ")[1].strip())
    for later in (b"", delta(usage=1)):
        parts = [SSE_HEAD, delta("a"), both, later, event(b"[DONE]"), b"0\r\n\r\n"]
        async with engine_for(saying(*parts)) as (_, engine):
            got = [json.loads(chunk) for chunk in await chunks_of(engine)]
        assert ["usage" in chunk for chunk in got] == [False, False, True]
        assert (got[1]["choices"][0]["finish_reason"], got[2]["choices"]) == ("stop", [])
        assert got[2]["usage"]["prompt_tokens"] == (3 if later else 1)


async def test_a_connection_serves_one_answer_after_the_other() -> None:
    """A well-ended stream leaves its connection for the next."""

    async def script(talk: Talk) -> None:
        while True:
            await talk.request()
            await talk.say(stream("a"))

    async with engine_for(script) as (hostile, engine):
        for _ in range(5):
            assert text_of(await chunks_of(engine)) == "a"
        assert hostile.connections == 1


async def test_leaving_a_stream_hangs_up_on_the_engine() -> None:
    """An engine sees at once that nobody wants the rest."""
    gone = asyncio.Event()

    async def endless(talk: Talk) -> None:
        await talk.request()
        await talk.say(SSE_HEAD)
        try:
            while True:
                await talk.say(delta("a"))
                await asyncio.sleep(0.005)
        except ConnectionError:
            gone.set()

    async with engine_for(endless) as (_, engine):
        async with engine.generate(CALL) as chunks:
            await anext(chunks)
            await anext(chunks)
        async with asyncio.timeout(1):
            await gone.wait()


# 21: no connection


async def test_refused_and_reset_connections_are_unreachable() -> None:
    """Nobody there, or a reset before the answer: another node may do better."""

    async def resetting(talk: Talk) -> None:
        await talk.request()
        talk.reset()

    async with engine_for(resetting) as (hostile, engine):
        with pytest.raises(EngineUnreachable):
            await chunks_of(engine)
        engine_of_nobody = HttpEngine(Node(id="n", url=hostile.url))
    with pytest.raises(EngineUnreachable, match="refused"):
        await chunks_of(engine_of_nobody)


async def test_a_connect_that_takes_too_long_is_unreachable() -> None:
    """An address that never answers costs the connect timeout, not more."""
    loop = asyncio.get_running_loop()

    async def mute(talk: Talk) -> None:
        await talk.gone()  # accepts, and never answers the TLS hello

    async with Hostile(mute) as hostile:
        node = Node(id="n", url=hostile.url.replace("http:", "https:"))
        engine = HttpEngine(node, bounds=Bounds(connect_timeout_s=0.2))
        started = loop.time()
        with pytest.raises(ConnectTimeout, match="no connection within 0"):
            await chunks_of(engine)
        assert loop.time() - started < 2


# 23: what is hardly HTTP


HARDLY_HTTP = [
    pytest.param([b"<html>HTTP/0.9 says hello</html>\n"], id="HTTP/0.9"),
    pytest.param([b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n"], id="HTTP/2"),
    pytest.param([b"HTTP/1.1 999 OK\r\nContent-Length: 0\r\n\r\n"], id="status 999"),
    pytest.param([b"HTTP/1.1 099 OK\r\nContent-Length: 0\r\n\r\n"], id="status 99"),
    pytest.param([b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n"], id="status 101"),
    pytest.param([b"HTTP/1.1 100 Continue\r\n\r\n"] * 1_000, id="1xx storm"),
    pytest.param(
        [b"HTTP/1.1 103 Soon\r\nTransfer-Encoding: chunked\r\n\r\n", delta("a"), stream("b")],
        id="1xx with a body",
    ),
    pytest.param([b"HTTP/1.1 200 OK\r\n", *[b"X-Y: z\r\n"] * 20_000], id="endless head"),
    pytest.param([b"HTTP/1.1 200 OK\r\nX: ", *[b"a" * 65_536] * 50], id="endless header"),
    pytest.param(
        [b"HTTP/1.1 200 OK\r\nX: " + b"a" * ENGINE_HEAD_BYTES_MAX + b"\r\n\r\n"], id="big head"
    ),
    pytest.param(
        [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"],
        id="length and chunks",
    ),
    pytest.param(
        [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n"],
        id="two lengths",
    ),
    pytest.param([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nx"], id="gzip coding"),
    pytest.param([b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n"], id="negative length"),
    pytest.param([b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n"], id="obs-fold"),
    pytest.param([b"HTTP/1.1 200 OK\r\nA: b\x00c\r\n\r\n"], id="NUL in a header"),
    pytest.param([SSE_HEAD, b"ffffffffffffffffff\r\n"], id="chunk size of 2^72"),
    pytest.param([SSE_HEAD, b"zz\r\n"], id="no chunk size"),
    pytest.param([SSE_HEAD, b"5;", *[b"a" * 65_536] * 50], id="endless chunk extension"),
    pytest.param([SSE_HEAD, b"0\r\n", *[b"T: a\r\n"] * 20_000], id="endless trailers"),
]


@pytest.mark.parametrize("parts", HARDLY_HTTP)
async def test_what_is_hardly_http_is_cut_off(parts: list[bytes]) -> None:
    """A head that never ends, other protocols, unclear lengths: broken, in bounded memory."""
    assert isinstance(await fault(*parts), EngineBroken)


async def test_an_answer_without_length_or_chunks_must_end_by_itself() -> None:
    """To the end of the connection is legal for a stream that says [DONE], and else broken."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    plain = re.sub(rb"[0-9a-f]+\r\n(data: .*\n\n)\r\n", rb"\1", stream("a"))
    body = plain.partition(b"\r\n\r\n")[2].removesuffix(b"0\r\n\r\n")
    async with engine_for(saying(head + body)) as (hostile, engine):
        assert text_of(await chunks_of(engine)) == "a"
        assert text_of(await chunks_of(engine)) == "a"
        assert hostile.connections == 2
    cut = body.partition(b"data: [DONE]")[0].rpartition(b"data: ")[0]
    error = await fault(head + cut, stay=False)
    assert isinstance(error, EngineBroken)
    async with engine_for(saying(b'HTTP/1.1 200 OK\r\n\r\n{"data": []}')) as (_, engine):
        with pytest.raises(EngineBroken, match="how long"):
            await engine.embed(EMBED)


# 24: silence


async def test_silence_is_told_as_such() -> None:
    """An engine that stops in the middle is stalled, after the bound."""
    assert isinstance(await fault(SSE_HEAD, delta("a"), silence_s=0.3), EngineStalled)


# 25: the end before the end


@pytest.mark.parametrize(
    ("upto", "whole"),
    [
        (b"rl", False),  # in mid-token
        (b"w\xc3", False),  # in mid-character
        (b"\r\ndata: {", False),  # in mid-chunk
        (b'"finish_reason":"stop"', False),
        (b'"total_tokens":5}}\n\n', True),  # right after usage
        (b"[DONE]", True),
        (b"[DONE]\n\n\r\n", True),  # right before the end of the framing
    ],
)
@pytest.mark.parametrize("reset", [False, True])
async def test_a_node_that_dies_in_the_middle(upto: bytes, *, whole: bool, reset: bool) -> None:
    """What came whole before the end is passed on; an answer is complete with finish and usage."""
    text = stream("Hello", "wörld").replace(b"w\\u00f6rld", b"w\xc3\xb6rld    ")  # as long
    assert text.count(upto) >= 1
    cut = text[: text.rindex(upto) + len(upto)]

    async def dying(talk: Talk) -> None:
        await talk.request()
        await talk.say(cut)
        await asyncio.sleep(0.05)
        if reset:
            talk.reset()

    async with engine_for(dying) as (_, engine):
        got: list[bytes] = []
        if whole:
            await chunks_of(engine, got)
            assert text_of(got) == "Hellowörld    "
        else:
            with pytest.raises(EngineBroken):
                await chunks_of(engine, got)
            assert text_of(got) in ("Hello", "Hellowörld    ")


async def test_no_end_of_stream_is_tolerated_with_finish_and_usage_only() -> None:
    """Some engines leave [DONE] out; without usage or finish reason that is a broken answer."""
    finish, usage, end = delta(finish="stop"), delta(usage=1), b"0\r\n\r\n"
    async with engine_for(saying(SSE_HEAD, delta("a"), finish, usage, end)) as (_, engine):
        assert len(await chunks_of(engine)) == 3
    for parts in ([finish], [usage], []):
        error = await fault(SSE_HEAD, delta("a"), *parts, end)
        assert isinstance(error, EngineBroken)
        assert "ended before its answer did" in error.message


# 26, 27: floods


async def test_an_endless_stream_ends_when_it_is_left() -> None:
    """Past max_tokens it is the gateway that leaves; the engine is then cut off at once."""
    stopped = asyncio.Event()

    async def endless(talk: Talk) -> None:
        await talk.request()
        await talk.say(SSE_HEAD)
        try:
            while True:
                await talk.say(delta("a") * 100)
        except ConnectionError:
            stopped.set()

    async with engine_for(endless) as (_, engine):
        async with engine.generate(CALL) as chunks:
            for _ in range(1_000):
                await anext(chunks)
        async with asyncio.timeout(1):
            await stopped.wait()


FLOODS = [
    pytest.param(chunked(b"data: " + b"a" * 65_536), id="one endless line"),
    pytest.param(chunked(b"data:\n\n" * 10_000), id="empty events"),
    pytest.param(chunked(b": hi\n\n" * 10_000), id="comments"),
    pytest.param(chunked(b"data: a\n" * 10_000), id="one endless event"),
    pytest.param(chunked(b"event: x\nid: 1\n\n" * 10_000), id="events without data"),
]


@pytest.mark.parametrize("flood", FLOODS)
async def test_floods_are_cut_off(flood: bytes) -> None:
    """What brings no chunk is bounded: the connection is cut, and little was kept."""
    sent = 0
    cut = asyncio.Event()

    async def flooding(talk: Talk) -> None:
        nonlocal sent
        await talk.request()
        await talk.say(SSE_HEAD)
        try:
            while sent < 1 << 30:
                await talk.say(flood)
                sent += len(flood)
        except ConnectionError:
            cut.set()

    async with engine_for(flooding) as (_, engine):
        with pytest.raises(EngineBroken, match="more than"):
            await chunks_of(engine)
        async with asyncio.timeout(2):
            await cut.wait()
    assert sent < 64 * CHUNK_BYTES_MAX


async def test_a_gigabyte_in_one_http_chunk_is_cut_off() -> None:
    """One HTTP chunk may be announced as large as it likes; its event may not."""
    parts = [b"data: " + b"a" * 65_536] + [b"a" * 65_536] * 200
    error = await fault(SSE_HEAD, b"40000000\r\n", *parts)
    assert isinstance(error, EngineBroken)


async def test_a_chunk_at_the_limit_and_one_above() -> None:
    """A chunk may be as long as the limit says, its field's name included."""
    frame = len('data: {"a":""}')
    fits = event(b'{"a":"%b"}' % (b"x" * (CHUNK_BYTES_MAX - frame)))
    end = delta(finish="stop") + event(b"[DONE]") + b"0\r\n\r\n"
    async with engine_for(saying(SSE_HEAD, fits, end)) as (_, engine):
        assert len((await chunks_of(engine))[0]) == CHUNK_BYTES_MAX - len("data: ")
    above = event(b'{"a":"%b"}' % (b"x" * (CHUNK_BYTES_MAX - frame + 1)))
    assert isinstance(await fault(SSE_HEAD, above, end), EngineBroken)


# 28: injection


async def test_done_within_a_text_ends_nothing() -> None:
    """What looks like framing inside a JSON string is text."""
    text = 'data: [DONE]\n\ndata: {"error": 1}\r\n: comment\u2028\revent: x'
    async with engine_for(saying(stream(text, "after"))) as (_, engine):
        assert text_of(await chunks_of(engine)) == text + "after"


async def test_a_payload_over_several_lines_becomes_one() -> None:
    """A chunk is one line, whatever line ends its event had; nothing of it can start another."""
    split = chunked(b'data: {"choices":\r\ndata: [],\rdata: "x": 1}\n\n')
    end = delta(finish="stop") + event(b"[DONE]") + b"0\r\n\r\n"
    async with engine_for(saying(SSE_HEAD, split, end)) as (_, engine):
        first = (await chunks_of(engine))[0]
    assert json.loads(first) == {"choices": [], "x": 1}
    assert b"\n" not in first
    assert b"\r" not in first


@pytest.mark.parametrize(
    "payload",
    [
        b"not json",
        b"[1]",
        b'"text"',
        b"1",
        b'{"a": 1} {"b": 2}',
        b'{"a": NaN}',
        b'{"a": "\xff"}',
        b'{"a": "b\x00"}',
        b"[DONE] ",
        b"[done]",
        b'{"choices": {}}',
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
async def test_json_that_is_none_never_gets_through(payload: bytes) -> None:
    """A payload is one JSON object in valid UTF-8, or the stream is broken."""
    got: list[bytes] = []
    script = saying(SSE_HEAD, delta("a"), event(payload), delta("b"), stay=True)
    async with engine_for(script) as (_, engine):
        with pytest.raises(EngineBroken):
            await chunks_of(engine, got)
    assert text_of(got) == "a"


@pytest.mark.parametrize(
    ("payload", "kind"),
    [
        (b'{"error": {"message": "x", "code": 500}}', EngineBroken),
        (b'{"error": {"message": "x"}}', EngineBroken),
        (b'{"error": {"message": "x", "code": "server_error"}}', EngineBroken),
        (b'{"error": {"message": "x", "code": 400}}', EngineRefused),
        (b'{"object": "error", "message": "x", "code": 400}', EngineRefused),
        (b'{"error": {"message": "x", "code": 401}}', EngineDeclined),
        (b'{"error": {"message": "x", "code": 200}}', EngineBroken),
        (b'{"error": "overloaded", "error_type": "overloaded"}', EngineBroken),
        (b'{"error": {}}', EngineBroken),
        (b'{"error": true}', EngineBroken),
    ],
)
async def test_an_error_in_the_stream(payload: bytes, kind: type[EngineError]) -> None:
    """An error event ends the answer; a code of the request's own fault makes it a refusal."""
    got: list[bytes] = []
    async with engine_for(saying(SSE_HEAD, delta("a"), event(payload), stay=True)) as (_, engine):
        with pytest.raises(EngineError) as caught:
            await chunks_of(engine, got)
    assert type(caught.value) is kind
    assert text_of(got) == "a"


async def test_what_comes_after_done_is_dropped() -> None:
    """A stream's end is its end."""
    whole = stream("a").removesuffix(b"0\r\n\r\n") + delta("forged") + b"0\r\n\r\n"
    async with engine_for(saying(whole)) as (_, engine):
        assert text_of(await chunks_of(engine)) == "a"


async def test_a_second_answer_reaches_nobody() -> None:
    """Two answers to one request: the second is not given to the next one who asks."""
    twice = stream("a") + stream("forged")
    async with engine_for(saying(twice, stay=True)) as (_, engine):
        assert text_of(await chunks_of(engine)) == "a"
        assert text_of(await chunks_of(engine)) == "a"


# 32: led astray


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_never_followed(status: int) -> None:
    """A redirect, to the cloud's metadata or anywhere, is a broken engine."""
    lured = asyncio.Event()

    async def lure(talk: Talk) -> None:
        await talk.request()
        lured.set()

    async with Hostile(lure) as elsewhere:
        head = f"HTTP/1.1 {status} Go\r\nLocation: {elsewhere.url}/\r\nContent-Length: 0\r\n\r\n"
        error = await fault(head.encode())
    assert isinstance(error, EngineBroken)
    assert not lured.is_set()


async def test_cookies_are_not_kept() -> None:
    """What an engine sets is not sent back."""

    async def baker(talk: Talk) -> None:
        while True:
            await talk.request()
            head = SSE_HEAD.replace(b"\r\n", b"\r\nSet-Cookie: a=b\r\n", 1)
            await talk.say(head + stream("a").removeprefix(SSE_HEAD))

    async with engine_for(baker) as (hostile, engine):
        await chunks_of(engine)
        await chunks_of(engine)
        assert len(hostile.seen) == 2
        assert all("cookie" not in seen.headers for seen in hostile.seen)


async def test_proxy_settings_are_not_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The address that the operator gave is the one that is dialled."""
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with engine_for(saying(stream("a"))) as (_, engine):
        assert text_of(await chunks_of(engine)) == "a"
