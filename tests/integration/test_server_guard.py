"""What the guard in front of the server makes of malformed, slow and greedy clients."""

from __future__ import annotations

import asyncio
import json
import resource
import time
from contextlib import AsyncExitStack

import pytest

from anser.wire.server import GuardSettings
from tests.guarded import Client, Guarded, guarded_server, post
from tests.odd import CHUNKED, POST, UNCLEAR

pytestmark = pytest.mark.anyio

QUICK = GuardSettings(
    head_bytes_max=1_024,
    head_timeout_s=0.3,
    body_timeout_s=0.4,
    idle_timeout_s=0.5,
    write_timeout_s=0.5,
    connections_max=1_000,
)


async def refusal(server: Guarded, *parts: bytes) -> tuple[int, str]:
    """Send these bytes; the status and code of the one answer, after which the server closes."""
    async with Client.to(server) as client:
        for part in parts:
            client.send(part)
            await asyncio.sleep(0.01)
        status, head, body = await client.answer()
        assert b"connection: close" in head
        assert b"content-type: application/json" in head
        assert b"x-request-id: req_" in head
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        client.writer.write_eof()
        assert await client.closed()
        return status, error["code"]


async def pour_into(client: Client, size: int) -> None:
    """Send so many bytes, as fast as they are taken."""
    for _ in range(size // 65_536):
        client.send(b"x" * 65_536)
        await client.writer.drain()


async def well(server: Guarded) -> None:
    """Another client is served as if nothing were."""
    async with Client.to(server) as client:
        client.send(post("/well", b"abc"))
        status, _, body = await client.answer()
        assert (status, body) == (200, b"/well:3")


# Sound requests


async def test_sound_requests_pass() -> None:
    """Bodies by length, in chunks, in pieces, and none at all, on one connection."""
    chunked = b"POST /c HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with guarded_server(QUICK) as server, Client.to(server) as client:
        for request, expected in [
            (post("/a", b"x" * 10), b"/a:10"),
            (post("/z"), b"/z:0"),
            (b"GET /g?q=1 HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", b"/g:0"),
            (b"\r\n\r\nGET /crlf HTTP/1.1\r\nHost: a\r\n\r\n", b"/crlf:0"),
            (chunked + b"5\r\nhello\r\n00A\r\n0123456789\r\n0\r\n\r\n", b"/c:15"),
            (chunked + b"0\r\n\r\n", b"/c:0"),
        ]:
            client.send(request)
            assert (await client.answer())[2] == expected
            for index in range(len(request)):
                client.send(request[index : index + 1])
                await asyncio.sleep(0)
            assert (await client.answer())[2] == expected


async def test_a_large_body_passes() -> None:
    """A body far longer than any buffer arrives whole, by length and in chunks."""
    body = bytes(range(256)) * 20_000
    parts = b"".join(
        b"%x\r\n%b\r\n" % (9_973, body[i : i + 9_973]) for i in range(0, 997_300, 9_973)
    )
    async with guarded_server(GuardSettings()) as server, Client.to(server) as client:
        client.send(post("/a", body))
        assert (await client.answer())[2] == b"/a:5120000"
        client.send(b"POST /c HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n")
        client.send(parts + b"0\r\n\r\n")
        assert (await client.answer())[2] == b"/c:997300"
        assert server.bodies == [body, body[:997_300]]


async def test_expect_100_continue() -> None:
    """A client that asks before it sends is told to go on."""
    async with guarded_server(QUICK) as server, Client.to(server) as client:
        client.send(b"POST /e HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n")
        client.send(b"Expect: 100-continue\r\n\r\n")
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(b"hi")
        assert (await client.answer())[2] == b"/e:2"


UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUPGRADE: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
CODING = b"Transfer-Encoding: chunked\r\n"


async def test_an_upgrade_is_ignored() -> None:
    """Protocols are not switched: a request that offers it is an ordinary one, whatever its body.

    Bytes after it are the next request's, in the same read or a later one.
    """
    requests = [
        (b"GET /g HTTP/1.1\r\nHost: a\r\n" + UPGRADE + b"\r\n", b"/g:0"),
        (post("/l", b"abc", headers=UPGRADE), b"/l:3"),
        (post("/z", b"", headers=UPGRADE), b"/z:0"),
        (
            b"POST /c HTTP/1.1\r\nHost: a\r\n" + CODING + UPGRADE + b"\r\n3\r\nabc\r\n0\r\n\r\n",
            b"/c:3",
        ),
        (post("/w", b"abc", headers=b"Upgrade: websocket\r\nConnection: upgrade\r\n"), b"/w:3"),
        (
            post("/two", b"abc", headers=b"Upgrade: a\r\nupgrade: b\r\nConnection: Upgrade\r\n"),
            b"/two:3",
        ),
        (post("/plain", b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"), b"/plain:35"),
    ]
    async with guarded_server(QUICK) as server, Client.to(server) as client:
        for request, expected in requests:
            client.send(request)
            status, _, body = await client.answer()
            assert (status, body) == (200, expected)
        client.send(b"".join(request for request, _ in requests))
        for _, expected in requests:
            assert (await client.answer())[2] == expected
        assert b"/smuggled" not in b" ".join(path.encode() for path in server.paths)


@pytest.mark.parametrize(
    "head",
    [
        b"POST / HTTP/1.1\r\nHost: a\r\nUpgrade : h2c\r\nContent-Length: 0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nUpgrade: h2c\r\n X: y\r\nContent-Length: 3\r\n\r\nabc",
        b"POST / HTTP/1.1\r\nHost: a\r\nUpgrade: h2c\nContent-Length: 3\r\n\r\nabc",
        b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"CONNECT /a HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
async def test_an_upgrade_hides_nothing(head: bytes) -> None:
    """A head that only looks like one with an Upgrade line is refused, and nothing is tunnelled."""
    async with guarded_server(QUICK) as server:
        assert await refusal(server, head) == (400, "malformed_request")
        assert server.paths == []


# 1: heads that are too long or too slow


async def test_a_head_at_the_limit_and_one_above() -> None:
    """A head may have as many bytes as the limit says, whether it comes at once or in pieces."""
    frame = b"GET /h HTTP/1.1\r\nHost: a\r\nX: \r\n\r\n"

    def head(size: int) -> bytes:
        return frame.replace(b"X: ", b"X: " + b"y" * (size - len(frame)))

    async with guarded_server(QUICK) as server:
        async with Client.to(server) as client:
            client.send(head(1_024))
            assert (await client.answer())[2] == b"/h:0"
        assert await refusal(server, head(1_025)) == (431, "head_too_large")
        assert await refusal(server, head(1_025)[:800], head(1_025)[800:]) == (
            431,
            "head_too_large",
        )
        assert await refusal(server, b"GET /" + b"a" * 2_000) == (431, "head_too_large")
        assert server.paths == ["/h"]


async def test_a_head_that_is_trickled_is_timed_out() -> None:
    """A head byte by byte is given up after the head timeout, however often bytes come."""
    async with guarded_server(QUICK) as server, Client.to(server) as client:
        started = time.monotonic()
        client.send(b"GET / HTTP/1.1\r\nHost: a\r\n")
        while time.monotonic() - started < 0.25:
            client.send(b"X: y\r\n")
            await asyncio.sleep(0.02)
        status, _, body = await client.answer()
        assert (status, json.loads(body)["error"]["code"]) == (408, "head_timeout")
        assert time.monotonic() - started < 1
        assert server.paths == []


async def test_a_connection_that_says_nothing_is_closed() -> None:
    """A fresh connection without a byte, and a kept one without a request, are closed silently."""
    async with guarded_server(QUICK) as server:
        async with Client.to(server) as client:
            assert await client.closed()
        async with Client.to(server) as client:
            client.send(post("/k"))
            await client.answer()
            started = time.monotonic()
            assert await client.closed()
            assert 0.3 < time.monotonic() - started < 2


@pytest.mark.slow
async def test_five_hundred_slow_connections_leave_others_unharmed() -> None:
    """Slowloris in numbers: others are served meanwhile, and all slow ones are given up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 4_096) if hard != resource.RLIM_INFINITY else 4_096
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    settings = GuardSettings(head_timeout_s=2.0)
    async with guarded_server(settings) as server, AsyncExitStack() as stack:
        slow = [await stack.enter_async_context(Client.to(server)) for _ in range(500)]
        waits = []
        for _ in range(10):
            for client in slow:
                client.send(b"E" if waits else b"G")
            started = time.monotonic()
            await well(server)
            waits.append(time.monotonic() - started)
            await asyncio.sleep(0.02)
        assert max(waits) < 0.5
        async with asyncio.timeout(10):
            answers = [await client.reader.read() for client in slow]
        assert all(b" 40" in answer[:12] for answer in answers)
        await well(server)


# 2: framing that is unclear


@pytest.mark.parametrize("request_", UNCLEAR)
async def test_unclear_framing_is_refused(request_: bytes) -> None:
    """400 in the envelope and close; at once or byte by byte; others go on."""
    async with guarded_server(QUICK) as server:
        assert await refusal(server, request_) == (400, "malformed_request")
        cut = len(request_) // 2
        assert await refusal(server, request_[:cut], request_[cut:]) == (400, "malformed_request")
        assert server.bodies == []  # no refused body was ever taken for whole
        await asyncio.gather(refusal(server, request_), well(server))


# 3: pipelining


async def test_pipelined_requests_are_answered_in_order() -> None:
    """Requests sent ahead are answered one after the other, the malformed one refused in turn."""
    async with guarded_server(QUICK) as server, Client.to(server) as client:
        bad = b"GET /bad HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"
        client.send(post("/1", b"a") + post("/2", b"bb") + bad + post("/4"))
        assert (await client.answer())[2] == b"/1:1"
        assert (await client.answer())[2] == b"/2:2"
        status, _, body = await client.answer()
        assert (status, json.loads(body)["error"]["code"]) == (400, "malformed_request")
        assert await client.closed()
        assert server.paths == ["/1", "/2"]


async def test_what_is_sent_ahead_waits_for_the_answer() -> None:
    """While an answer is under way, nothing more of that connection reaches the application."""
    async with guarded_server(QUICK) as server, Client.to(server) as client:
        client.send(post("/wait") + b"garbage\n")
        await asyncio.sleep(0.05)
        assert server.paths == ["/wait"]
        server.go.set()
        assert (await client.answer())[2] == b"waited"
        assert (await client.answer())[0] == 400


async def test_what_is_sent_ahead_is_bounded() -> None:
    """A client that sends without end while its answer is under way is not read without end."""
    async with guarded_server(QUICK) as server, Client.to(server) as client:
        client.send(post("/wait"))
        flood = asyncio.wait_for(pour_into(client, 64 * 1024 * 1024), 0.5)
        with pytest.raises(TimeoutError):
            await flood
        server.go.set()
        assert (await client.answer())[2] == b"waited"


async def test_a_client_that_leaves_is_seen_behind_a_sent_ahead_request() -> None:
    """A hang-up reaches the application though more of that client's bytes wait."""
    async with guarded_server(QUICK) as server:
        async with Client.to(server) as client:
            client.send(post("/wait") + post("/next"))
            await asyncio.sleep(0.05)
        async with asyncio.timeout(2):
            await server.left.wait()
        assert server.paths == ["/wait"]


# 5: bodies that do not come


@pytest.mark.parametrize("head", [POST + b"Content-Length: 100\r\n\r\nx", CHUNKED + b"5\r\nx"])
async def test_a_body_that_stops_is_timed_out(head: bytes) -> None:
    """A body that stops half-way, or trickles, is given up; the application sees a hang-up."""
    async with guarded_server(QUICK) as server:
        assert await refusal(server, head) == (408, "body_timeout")
        await asyncio.wait_for(server.left.wait(), 1)
        assert server.bodies == []
        started = time.monotonic()
        assert await refusal(server, head, *[b"y"] * 3) == (408, "body_timeout")
        assert time.monotonic() - started < 2


async def test_the_rest_of_a_body_after_its_answer() -> None:
    """An answer that did not wait for the body: the rest is read away, then the next request."""
    async with guarded_server(QUICK) as server, Client.to(server) as client:
        client.send(POST.replace(b"/", b"/early", 1) + b"Content-Length: 200000\r\n\r\nx")
        assert (await client.answer())[2] == b"early"
        for _ in range(4):
            client.send(b"y" * 49_999)
            await asyncio.sleep(0.02)
        client.send(b"zzz" + post("/next", b"a"))
        assert (await client.answer())[2] == b"/next:1"


async def test_a_body_that_goes_on_after_its_answer_is_cut_off() -> None:
    """A client that has been answered and sends on for too long is not listened to any more."""
    async with guarded_server(QUICK) as server, Client.to(server) as client:
        client.send(POST.replace(b"/", b"/early", 1) + b"Content-Length: 200000\r\n\r\nx")
        assert (await client.answer())[2] == b"early"
        started = time.monotonic()
        while not client.reader.at_eof() and time.monotonic() - started < 5:
            client.send(b"y")
            await asyncio.sleep(0.02)
        assert time.monotonic() - started < 2


async def test_an_application_that_does_not_read_is_not_the_clients_fault() -> None:
    """While it is the application that waits, the body's time does not run."""
    async with guarded_server(QUICK) as server, Client.to(server) as client:
        client.send(post("/unread", b"x" * 4_000_000))
        await asyncio.sleep(1)
        server.go.set()
        assert (await client.answer())[2] == b"unread"


async def test_a_malformed_body_after_the_answer_has_begun() -> None:
    """Where half an answer is out, no second one follows: the connection is cut."""
    async with guarded_server(QUICK) as server, Client.to(server) as client:
        client.send(CHUNKED.replace(b"/", b"/duplex", 1) + b"5\r\nhello\r\n")
        assert await client.reader.readuntil(b"begun\r\n")
        client.send(b"nonsense\r\n")
        assert await client.closed()
        await asyncio.wait_for(server.left.wait(), 1)


async def test_a_malformed_body_after_its_answer() -> None:
    """An answer that did not wait for the body is the only one: what is malformed ends it."""
    async with guarded_server(QUICK) as server, Client.to(server) as client:
        client.send(CHUNKED.replace(b"/", b"/early", 1) + b"5\r\nhello\r\n")
        assert (await client.answer())[2] == b"early"
        client.send(b"nonsense\r\n")
        assert await client.closed()


# 14: clients that do not read


async def test_a_client_that_does_not_read_is_cut_off() -> None:
    """After the write timeout the connection is cut, and the application's slot is free."""
    async with guarded_server(QUICK) as server, Client.to(server) as client:
        client.reader._transport.pause_reading()  # type: ignore[attr-defined]
        client.send(post("/pour"))
        await asyncio.sleep(0.3)
        assert 0 < server.sent < 64 * 1024 * 1024
        await asyncio.sleep(0.8)
        client.reader._transport.resume_reading()  # type: ignore[attr-defined]
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await client.reader.readexactly(4_096 * 65_536)
        await well(server)


async def test_a_slow_reader_gets_everything() -> None:
    """A client that reads slowly but steadily is not cut off, however long it takes."""
    settings = GuardSettings(write_timeout_s=1.5)
    async with guarded_server(settings) as server, Client.to(server) as client:
        client.send(b"GET /pour HTTP/1.0\r\n\r\n")
        got, started = 0, time.monotonic()
        while time.monotonic() - started < 3:
            got += len(await client.reader.read(65_536))
            await asyncio.sleep(0.01)
        while data := await client.reader.read(1 << 20):
            got += len(data)
        assert got > 4_096 * 65_536


async def test_an_answer_without_length_has_no_chunks_in_http_1_0() -> None:
    """RFC 9112, 6.1: whoever speaks 1.0 knows no chunks; the end is that of the connection."""
    async with guarded_server(QUICK) as server, Client.to(server) as client:
        client.send(b"POST /duplex HTTP/1.0\r\nContent-Length: 0\r\n\r\n")
        got = await client.reader.read()
    head, _, body = got.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
    assert body == b"begunended"


# The cap


async def test_connections_at_the_cap_and_one_above() -> None:
    """One connection too many is told so at once, and another may come when one has gone."""
    settings = GuardSettings(connections_max=3)
    async with guarded_server(settings) as server, Client.to(server), Client.to(server):
        await well(server)
        async with Client.to(server) as third:
            await asyncio.sleep(0.05)
            assert await refusal(server) == (503, "overloaded")
            third.send(post("/third"))
            assert (await third.answer())[2] == b"/third:0"
        await asyncio.sleep(0.05)
        await well(server)
