"""The fast lane beside the way by ASGI: the same bytes in, the same bytes out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Scope as ConnectionScope

from anser.adapters.memory_engine import Fault, FaultKind, MemoryEngine
from anser.api.auth import Doorkeeper, Header
from anser.api.lane import InferenceLane
from anser.config import GatewaySettings, MemberSettings
from anser.core.fleet import Node
from anser.core.health import NodeState
from anser.core.ledger import Outcome
from anser.ports import Call
from anser.services.members import OWNER, Principal
from anser.wire.cors import Cors
from anser.wire.proxies import Proxies
from anser.wire.server import GuardSettings
from anser.wire.turn import lane_of
from tests.stage import stage
from tests.ways import CHAT, LAST, TEXT, Ways, request, two_ways

pytestmark = pytest.mark.anyio

HELLO: dict[str, Any] = {
    "model": "memory",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 5,
}
WRITE: dict[str, Any] = {"model": "memory", "prompt": "once upon", "max_tokens": 5}
STREAM: dict[str, Any] = {**HELLO, "stream": True}
USAGE: dict[str, Any] = {**STREAM, "stream_options": {"include_usage": True}}
LONG: dict[str, Any] = {**STREAM, "max_tokens": 3_000, "messages": HELLO["messages"] * 3}

BY_LANE = [
    pytest.param(request(HELLO), id="whole chat"),
    pytest.param(request(WRITE, TEXT), id="whole text"),
    pytest.param(request(STREAM), id="stream"),
    pytest.param(request({**WRITE, "stream": True}, TEXT), id="text stream"),
    pytest.param(request(USAGE), id="stream with usage"),
    pytest.param(request(HELLO, CHAT, "X-Anser-Explain: 1"), id="why"),
    pytest.param(request(STREAM, CHAT, "X-Anser-Explain: 1"), id="why of a stream"),
    pytest.param(request({**HELLO, "model": "other"}, CHAT, "X-Anser-Explain: 1"), id="why not"),
    pytest.param(request(HELLO, CHAT, "X-Anser-Deadline: 30"), id="deadline"),
    pytest.param(request(HELLO, CHAT, "X-Anser-Deadline: soon"), id="no deadline"),
    pytest.param(request(HELLO, CHAT, "Authorization: Bearer hf_wrong"), id="wrong key"),
    pytest.param(request(HELLO, CHAT, "Authorization: Basic eA=="), id="no bearer"),
    pytest.param(request(HELLO, CHAT, "X-Api-Key: hf_wrong"), id="wrong key in x-api-key"),
    pytest.param(request(HELLO, CHAT, "Origin: https://evil.example"), id="another site's page"),
    pytest.param(request(HELLO, kind="text/plain"), id="wrong type"),
    pytest.param(request(HELLO, kind=None), id="no type"),
    pytest.param(request(HELLO, kind="Application/JSON; charset=utf-8"), id="type with charset"),
    pytest.param(request(HELLO, CHAT, "Content-Type: text/plain"), id="two types"),
    pytest.param(request(b'{"model": "memory", "messages": ['), id="bad JSON"),
    pytest.param(request(b"\xff\xfe{}"), id="no UTF-8"),
    pytest.param(request(b"[]"), id="no object"),
    pytest.param(request(b'{"a": 1, "a": 2}'), id="a key twice"),
    pytest.param(request({**HELLO, "surprise": 1}), id="unknown field"),
    pytest.param(request({**HELLO, "messages": []}), id="no messages"),
    pytest.param(request({**HELLO, "model": "nobody's"}), id="unknown model"),
    pytest.param(request({**HELLO, "max_tokens": 100_000}), id="too long"),
    pytest.param(request({**HELLO, "seed": 7, "temperature": None, "top_p": 0.5}), id="sampling"),
    pytest.param(request({**HELLO, "min_p": 0.1, "reasoning_effort": "low"}), id="extra fields"),
    pytest.param(request(b" " * 10_001), id="larger than may be"),
    pytest.param(request(HELLO, CHAT, "Connection: close"), id="close"),
    pytest.param(request(STREAM, CHAT, "Connection: close"), id="stream, close"),
    pytest.param(request(HELLO, CHAT, "Connection: upgrade", "Upgrade: websocket"), id="upgrade"),
    pytest.param(request({**HELLO, "n": 2}), id="declined: n"),
    pytest.param(request({**WRITE, "prompt": ["a", "b"]}, TEXT), id="declined: prompts"),
    pytest.param(request({**HELLO, "n": 2}, CHAT, "Connection: close"), id="declined, close"),
]
NOT_BY_LANE = [
    pytest.param(request(HELLO, CHAT + "?a=b"), id="query"),
    pytest.param(request(HELLO, CHAT + "/"), id="another path"),
    pytest.param(request(HELLO, "/v1/chat%2Fcompletions"), id="escaped"),
    pytest.param(request(b""), id="no body"),
    pytest.param(request(HELLO, version="1.0"), id="HTTP/1.0"),
    pytest.param(request(HELLO, CHAT, "Connection: keep-alive", version="1.0"), id="1.0 kept"),
    pytest.param(request(method="GET", kind=None), id="GET"),
    pytest.param(request(method="HEAD", kind=None), id="HEAD"),
    pytest.param(request(method="OPTIONS", kind=None), id="OPTIONS"),
    pytest.param(request(HELLO, method="PUT"), id="PUT"),
    pytest.param(request(HELLO, CHAT, "Content-Encoding: gzip"), id="gzip"),
    pytest.param(request(HELLO, CHAT, "Content-Encoding: identity"), id="identity"),
    pytest.param(request(HELLO, CHAT, "Expect: 100-continue"), id="expect"),
    pytest.param(
        request(b"2\r\n{}\r\n0\r\n\r\n", CHAT, "Transfer-Encoding: chunked"), id="chunked"
    ),
    pytest.param(request(b" " * 300_000), id="large"),
    pytest.param(request(HELLO, CHAT, "Host: b"), id="two hosts"),
    pytest.param(request(b"", CHAT, "Content-Length: 5", "Content-Length: 5"), id="two lengths"),
]


async def same(ways: Ways, *parts: bytes) -> bytes:
    """What both ways answer; they must not differ."""
    fast, plain = await ways.both(*parts)
    assert fast == plain
    return fast


@pytest.mark.parametrize("bytes_", BY_LANE)
async def test_the_lane_answers_as_asgi_does(tmp_path: Path, bytes_: bytes) -> None:
    """Status, headers in their order, framing and body are the same, byte for byte; so is what
    becomes of the next request on the connection.
    """
    async with stage(tmp_path) as scene, two_ways(scene) as ways:
        await same(ways, bytes_ + LAST)
        await same(ways, bytes_, LAST)
        assert len(ways.met) == 2
        await scene.pool.gateway.empty.wait()


@pytest.mark.parametrize("bytes_", NOT_BY_LANE)
async def test_what_is_unusual_keeps_its_way(tmp_path: Path, bytes_: bytes) -> None:
    """The lane is not even asked about it."""
    async with stage(tmp_path) as scene, two_ways(scene) as ways:
        await same(ways, bytes_ + LAST)
        assert ways.met == []


async def test_pipelined_requests_are_answered_in_order(tmp_path: Path) -> None:
    """Whether by the lane or not, the answers have the order of the requests."""
    async with stage(tmp_path) as scene, two_ways(scene) as ways:
        mixed = [HELLO, {**HELLO, "n": 2}, STREAM, {"bad": 1}, {**HELLO, "seed": 3}]
        ahead = b"".join(request(body) for body in mixed)
        answer = await same(ways, ahead + request(WRITE, TEXT) + LAST)
        assert answer.count(b"HTTP/1.1 ") == len(mixed) + 2
        assert answer.count(b'"text_completion"') == 1
        refused = request(b"{}") * 600
        answer = await same(ways, refused + request(STREAM, CHAT, "Connection: close"))
        assert answer.count(b"HTTP/1.1 400 ") == 600
        assert answer.endswith(b"0\r\n\r\n")


async def test_a_body_that_comes_late(tmp_path: Path) -> None:
    """Head and body may come apart, and in many parts; a refusal does not wait for the body."""
    bytes_ = request({**HELLO, "user": "x" * 5_000})
    head, body = bytes_[: bytes_.index(b"{")], bytes_[bytes_.index(b"{") :]
    async with stage(tmp_path) as scene, two_ways(scene) as ways:
        await same(ways, head, body + LAST)
        parts = [body[at : at + 700] for at in range(0, len(body), 700)]
        await same(ways, head, *parts, LAST)
        wrong = head.replace(b"Host: a", b"Host: a\r\nX-Api-Key: hf_wrong")
        refused = await same(ways, wrong, *parts, LAST)
        assert b"HTTP/1.1 401 " in refused
        for way in ("fast", "plain"):
            async with ways.connected(way) as (reader, writer):
                writer.write(wrong + body[:10])
                answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
                assert b" 401 " in answer


async def test_bodies_are_counted_as_they_come(tmp_path: Path) -> None:
    """The lane's bodies are among all that are held: refused at the limit, given back at the end,
    also by a client that leaves in mid-body.
    """
    async with stage(tmp_path) as scene, two_ways(scene) as ways:
        lane = lane_of(ways.noted.app)
        assert isinstance(lane, InferenceLane)
        bodies = lane.bodies
        bytes_ = request({**HELLO, "user": "x" * 5_000})
        async with ways.connected("fast") as (_, writer):
            writer.write(bytes_[:3_000])
            async with asyncio.timeout(5):
                while not bodies.held:
                    await asyncio.sleep(0.001)
        async with asyncio.timeout(5):
            while bodies.held:
                await asyncio.sleep(0.001)
        bodies.most = 4_000
        assert b"HTTP/1.1 503 " in await same(ways, bytes_ + LAST)
        assert b"HTTP/1.1 503 " in await same(ways, bytes_[:4_500], bytes_[4_500:] + LAST)
        assert bodies.held == 0
        bodies.validate()


async def test_limits_that_are_reached(tmp_path: Path) -> None:
    """429 has the same headers on both ways, and so has an answer what is left."""
    settings = MemberSettings(in_flight_max=1)
    async with (
        stage(tmp_path, member_settings=settings) as scene,
        two_ways(scene) as ways,
        ways.connected("plain") as (reader, writer),
    ):
        writer.write(request(LONG))
        await reader.readuntil(b"data: ")
        answer = await same(ways, request(HELLO) + LAST)
        assert answer.startswith(b"HTTP/1.1 429 ")
        assert b"x-ratelimit-remaining-requests: 0" in answer


@pytest.mark.parametrize("kind", [FaultKind.REFUSE, FaultKind.BREAK])
@pytest.mark.parametrize("after", [0, 2])
async def test_faults(tmp_path: Path, kind: FaultKind, after: int) -> None:
    """What fails before the first token is a status, later an event or, in whole answers, again a
    status.
    """
    settings = GatewaySettings(probe_interval_s=0.05, continue_answers=False)

    def fault(_: Call) -> Fault:
        return Fault(kind=kind, after_tokens=after)

    async def told(way: str, body: dict[str, Any]) -> bytes:
        """By a platform of its own, for a node that fails is not asked again at once."""
        async with (
            stage(tmp_path, fault=fault, settings=settings) as scene,
            two_ways(scene) as ways,
        ):
            return await ways.say(way, request(body) + LAST)

    for body in (HELLO, STREAM):
        fast = await told("fast", body)
        assert fast == await told("plain", body)
        assert b'"error"' in fast


async def test_a_bug_is_the_platforms_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An exception that nobody expects is 500 in the envelope; the log has its place alone."""

    def bug(call: Call) -> Fault | None:
        raise ValueError(call.body)

    secret = {**HELLO, "messages": [{"role": "user", "content": "the secret canary"}]}
    async with stage(tmp_path, fault=bug) as scene, two_ways(scene) as ways:
        answer = await same(ways, request(secret) + LAST)
    assert answer.startswith(b"HTTP/1.1 500 ")
    told = capsys.readouterr()
    assert "ValueError" in told.out + told.err
    assert "canary" not in told.out + told.err + answer.decode()


class Broken(Doorkeeper):
    """One who fails as nobody expects."""

    def admit(self, header: Header, scope: ConnectionScope) -> Principal:
        raise ValueError(header(b"x-secret"), scope)


async def test_a_bug_of_the_lane_ends_one_request_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What fails before a flight has been started is told the same way, and the connection kept."""
    async with stage(tmp_path) as scene, two_ways(scene) as ways:
        lane = lane_of(ways.noted.app)
        assert isinstance(lane, InferenceLane)
        lane.doorkeeper = Broken(scene.services.members, scene.services.clock)
        answer = await ways.say("fast", request(HELLO, CHAT, "X-Secret: canary") + LAST)
        assert repr(lane) == "<InferenceLane <_Watch 0 visits> <Bodies 0/268435456 bytes>>"
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert answer.count(b"HTTP/1.1 ") == 2
    told = capsys.readouterr()
    assert "ValueError" in told.out + told.err
    assert "canary" not in told.out + told.err + answer.decode()


async def test_pages_of_other_sites_and_proxies(tmp_path: Path) -> None:
    """CORS headers, and what a trusted proxy says, are the same on both ways."""
    guard = GuardSettings(
        cors=Cors(["https://chat.example"]), proxies=Proxies(["127.0.0.1"]), body_timeout_s=0.2
    )
    async with stage(tmp_path) as scene, two_ways(scene, guard) as ways:
        secret, _ = await scene.pool.members.create_key(OWNER, label="page")
        key = f"X-Api-Key: {secret}"
        for origin in ("https://chat.example", "https://evil.example"):
            for body in (HELLO, STREAM):
                await same(ways, request(body, CHAT, f"Origin: {origin}", key) + LAST)
            late = request(b"x", CHAT, f"Origin: {origin}", key, "Content-Length: 5")
            assert b" 408 " in await same(ways, late)
        for forwarded in ("X-Forwarded-For: 192.0.2.7", "Forwarded: for=192.0.2.7", "X: y"):
            await same(ways, request(HELLO, CHAT, forwarded) + LAST)
        page = ("Origin: http://evil.example", "Host: evil.example")
        bytes_ = request(HELLO, CHAT, *page).replace(b"Host: a\r\n", b"")
        assert b" 403 " in await same(ways, bytes_ + LAST)


@pytest.mark.parametrize("way", ["fast", "plain"])
async def test_a_client_that_leaves(tmp_path: Path, way: str) -> None:
    """Wherever it leaves, in its head or body, in the queue, in the stream, nothing is left behind,
    and the receipt says cancelled.
    """
    bytes_ = request(LONG)
    async with stage(tmp_path, slots=1) as scene, two_ways(scene) as ways:
        for cut in (10, len(bytes_) - 10):
            async with ways.connected(way) as (_, writer):
                writer.write(bytes_[:cut])
                await asyncio.sleep(0.02)
        gateway = scene.pool.gateway
        async with ways.connected(way) as (reader, writer):
            writer.write(bytes_)
            await reader.readuntil(b"data: ")
            async with ways.connected(way) as (_, other):
                other.write(bytes_)
                async with asyncio.timeout(5):
                    while not gateway.scheduler.queued:
                        await asyncio.sleep(0.001)
            async with asyncio.timeout(5):
                while gateway.scheduler.queued:
                    await asyncio.sleep(0.001)
        async with asyncio.timeout(5):
            await gateway.empty.wait()
        receipts = await scene.pool.receipts()
    assert [receipt.outcome for receipt in receipts] == [Outcome.CANCELLED] * 2
    assert sorted(bool(receipt.leases) for receipt in receipts) == [False, True]


class Verbose(MemoryEngine):
    """An engine whose answers are megabytes."""

    made = 0

    @asynccontextmanager
    async def generate(self, call: Call) -> AsyncGenerator[AsyncIterator[bytes]]:
        """Open one answer."""
        assert call.body["stream"]

        async def chunks() -> AsyncGenerator[bytes]:
            for _ in range(200):
                self.made += 1
                yield chunk({"content": "x" * 100_000})
            yield chunk({}, finish="stop")

        yield chunks()


def chunk(delta: dict[str, str], finish: str | None = None) -> bytes:
    """A chunk of a chat."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return json.dumps({"object": "chat.completion.chunk", "choices": [choice]}).encode()


@pytest.mark.parametrize("way", ["fast", "plain"])
async def test_a_client_that_is_slow_to_read(tmp_path: Path, way: str) -> None:
    """While it does not read, neither is its engine read from; if it reads on it gets all of it,
    and if it does not for too long it is cut off, and the engine stopped.
    """
    guard = GuardSettings(write_timeout_s=2.0)
    bytes_ = request({**STREAM, "model": "verbose", "max_tokens": 3_000})
    async with stage(tmp_path) as scene, two_ways(scene, guard) as ways:
        engine, fleet = Verbose("verbose"), scene.pool.fleet
        fleet.attach(Node(id="two", url="builtin:", model="verbose"), engine)
        async with asyncio.timeout(5):
            while fleet.status("two").state is not NodeState.UP:
                await asyncio.sleep(0.001)
        for patient in (True, False):
            engine.made = 0
            async with ways.connected(way) as (reader, writer):
                writer.write(bytes_ + LAST)
                await asyncio.sleep(0.5)
                assert 0 < engine.made < 150
                if patient:
                    answer = await asyncio.wait_for(reader.read(), 10)
                    assert answer.count(b"data: {") == 201
                    assert answer.count(b"data: [DONE]") == 1
                else:
                    async with asyncio.timeout(10):
                        await scene.pool.gateway.empty.wait()
                    assert engine.made < 150
        outcomes = [receipt.outcome for receipt in await scene.pool.receipts()]
    assert outcomes == [Outcome.CANCELLED, Outcome.FINISHED]


async def test_several_answers_in_a_stream(tmp_path: Path) -> None:
    """What the lane declines is answered with all that was asked for."""
    async with stage(tmp_path) as scene, two_ways(scene) as ways:
        fast, plain = await ways.both(request({**STREAM, "n": 2, "seed": 5}) + LAST)
    assert sorted(fast.splitlines()) == sorted(plain.splitlines())
    assert b'"index":1' in fast


@pytest.mark.parametrize("body", [LONG, {**LONG, "stream": False}])
async def test_the_platforms_end(tmp_path: Path, body: dict[str, Any]) -> None:
    """A quick end tells the same to whoever is answered on either way: an error event in a stream,
    503 before it; the engines are stopped.
    """
    got: dict[str, bytes] = {}
    async with stage(tmp_path) as scene:
        async with two_ways(scene) as ways:
            for way in ("fast", "plain"):
                async with ways.connected(way) as (reader, writer):
                    writer.write(request(body))
                    async with asyncio.timeout(5):
                        while not scene.pool.gateway.scheduler.running:
                            await asyncio.sleep(0.001)
                        if body["stream"]:
                            await reader.readuntil(b"data: ")
                        ways.doors[way].close(quickly=True)
                        got[way] = await reader.read()
        async with asyncio.timeout(5):
            await scene.pool.gateway.empty.wait()
        receipts = await scene.pool.receipts()
    for answer in got.values():
        assert b'"code":"shutting_down"' in answer
        assert b"[DONE]" not in answer
    if not body["stream"]:
        assert b" 503 " in got["fast"]
        assert b"connection: close" in got["fast"]
    assert [receipt.outcome for receipt in receipts] == [Outcome.CANCELLED] * 2


@pytest.mark.parametrize("body", [{**HELLO, "max_tokens": 60}, {**STREAM, "max_tokens": 60}])
async def test_an_orderly_end(tmp_path: Path, body: dict[str, Any]) -> None:
    """What runs when a door is closed comes to its proper end, and its connection is closed."""
    async with stage(tmp_path) as scene, two_ways(scene) as ways:
        for way in ("fast", "plain"):
            async with ways.connected(way) as (reader, writer):
                writer.write(request(body))
                async with asyncio.timeout(5):
                    while not scene.pool.gateway.scheduler.running:
                        await asyncio.sleep(0.001)
                    ways.doors[way].close(quickly=False)
                    answer = await reader.read()
            assert b'"finish_reason":"' in answer


async def test_whole_answers_are_the_same_from_odd_chunks(tmp_path: Path) -> None:
    """What is assembled from pieces that were read before equals what is decoded anew."""
    async with stage(tmp_path) as scene, two_ways(scene) as ways:
        fast = await ways.say("fast", request(HELLO) + LAST)
        stream = await ways.say("fast", request(STREAM) + LAST)
    whole = json.loads(fast.split(b"\r\n\r\n")[1].splitlines()[0].split(b"HTTP/1.1")[0])
    text = whole["choices"][0]["message"]["content"]
    events = [line for line in stream.splitlines() if line.startswith(b"data: {")]
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in events]
    assert "".join(delta.get("content") or "" for delta in deltas) == text
