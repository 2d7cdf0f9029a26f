"""Too much at once: floods, clients that leave or never read. All others go on unharmed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import statistics
import struct
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from tests.hostile import SSE_HEAD, Hostile, Talk, delta, stream
from tests.outside import CHAT, HELLO, listed
from tests.server import Server, serving, serving_model, wait_until
from tests.streams import WAIT_S, Stream, crowd, gated, soon
from tests.vitals import memory_bytes, needs_proc

pytestmark = pytest.mark.anyio

FLOOD = 2_000
OWN_QUEUE = 200
WHOLE_QUEUE = 250
SLOTS = 4
ANSWER_S = 0.15


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A platform with short queues, impatient with those who do not read."""
    environment = {
        "ANSER_MEMBERS_IN_FLIGHT_MAX": "100000",
        "ANSER_MEMBERS_QUEUED_MAX": str(OWN_QUEUE),
        "ANSER_GATEWAY_QUEUED_MAX": str(WHOLE_QUEUE),
        "ANSER_SERVER_WRITE_TIMEOUT_S": "1",
    }
    folder = tmp_path_factory.mktemp("overload") / "data"
    with serving(folder, "--no-engine", environment=environment) as running:
        yield running


@pytest.fixture(scope="module")
def members(server: Server) -> dict[str, str]:
    """Three members, each with a key."""
    made: dict[str, str] = {}
    for member in ("ada", "ben", "cleo"):
        server.admin("POST", "/members", {"id": member})
        made[member] = server.admin("POST", "/keys", {"member": member})["key"]
    return made


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A platform with the real model and one slot."""
    folder = tmp_path_factory.mktemp("leaving") / "data"
    with serving_model(folder, environment={"ANSER_ENGINE_SLOTS": "1"}) as running:
        yield running


async def until(server: Server, **wanted: int) -> None:
    """Wait until the pool's figures are these."""
    await asyncio.to_thread(
        wait_until,
        lambda: {name: server.pool()[name] for name in wanted} == wanted,
        within_s=WAIT_S,
    )


async def first_token_s(server: Server, key: str, times: int) -> float:
    """The median time to the first token of so many answers, one after the other."""
    taken: list[float] = []
    for _ in range(times):
        began = time.monotonic()
        async with Stream.asked(server, key=key) as stream:
            await stream.begun()
            taken.append(time.monotonic() - began)
            await stream.rest()
    return statistics.median(taken)


# Clients that do not read: 14


@needs_proc
async def test_those_who_never_read_hold_little(server: Server) -> None:
    """Ten clients ask for endless streams and read nothing: the platform holds a bounded part of
    each, cuts them off after the write timeout, and their slots serve others.
    """
    sent = 0

    async def flood(talk: Talk) -> None:
        nonlocal sent
        await talk.say(SSE_HEAD)
        while True:
            await talk.say(delta("x" * 50_000))
            sent += 50_000

    async with listed(server, flood, slots=10) as upstream:
        before = memory_bytes(server.process.pid)
        asked = await soon(deaf(server) for _ in range(10))
        await until(server, running=10)
        most = before
        while server.pool()["running"]:
            most = max(most, memory_bytes(server.process.pid))
            await asyncio.sleep(0.02)
        await soon(writer_gone(upstream) for _ in (0,))
        for writer in asked:
            writer.transport.abort()
    print(f"sent {sent / 1e6:.0f} MB, memory grew by {(most - before) / 1e6:.1f} MB")
    assert most - before < 60_000_000
    assert sent < 200_000_000


async def deaf(server: Server) -> asyncio.StreamWriter:
    """A client that asks and never reads."""
    stream = await Stream.ask(server, max_tokens=10**6)
    stream.writer.transport.pause_reading()  # type: ignore[attr-defined]
    return stream.writer


async def writer_gone(upstream: Hostile) -> None:
    """Wait until the platform has hung up on the node."""
    async with asyncio.timeout(WAIT_S):
        await upstream.hung_up.wait()


# One member's flood: 11, 12, 60


async def steady(talk: Talk) -> None:
    """An answer whose first token comes at once, and whose end after ANSWER_S."""
    await talk.say(SSE_HEAD, delta("a"))
    await asyncio.sleep(ANSWER_S)
    await talk.say(stream("b").removeprefix(SSE_HEAD))


async def test_a_flood_is_its_senders_own_trouble(server: Server, members: dict[str, str]) -> None:
    """Of 2,000 requests at once those beyond the sender's own queue get 429, with what they need
    to come back later; while the rest wait, another member and a client without a key have their
    first token after about one answer's time, not after the whole queue's.
    """
    async with listed(server, steady, slots=SLOTS):
        quiet_s = await first_token_s(server, members["ben"], 5)
        async with crowd(server, FLOOD, key=members["ada"]) as flood:
            await asyncio.to_thread(
                wait_until, lambda: server.pool()["queued"] > OWN_QUEUE - 20, within_s=WAIT_S
            )
            others = soon(first_token_s(server, key, 8) for key in (members["ben"], ""))
            limited = asyncio.ensure_future(refusals(flood))
            ben_s, anonymous_s = await others
            assert server.pool()["queued"] > 0, "the flood was over before anything was measured"
            refused = await limited
        await until(server, running=0, queued=0)
    print(f"first token: quiet {quiet_s:.3f} s, ben {ben_s:.3f} s, anonymous {anonymous_s:.3f} s")
    assert FLOOD - 2 * OWN_QUEUE <= len(refused) <= FLOOD - OWN_QUEUE
    for turned_away in refused:
        assert turned_away.headers["retry-after"].isdecimal()
        assert turned_away.headers["x-ratelimit-limit-requests"] == "100000"
        assert int(turned_away.headers["x-ratelimit-remaining-requests"]) < 100_000
    whole_queue_s = OWN_QUEUE * ANSWER_S / SLOTS
    for loaded_s in (ben_s, anonymous_s):
        assert loaded_s < quiet_s + 3 * ANSWER_S < whole_queue_s / 5


async def refusals(flood: list[Stream]) -> list[Stream]:
    """Those that are refused at once: all with 429, each with the reason."""

    async def refused(stream: Stream) -> Stream | None:
        try:
            async with asyncio.timeout(4):
                if await stream.status() == 200:
                    return None
        except TimeoutError:
            return None  # it waits
        assert await stream.status() == 429
        assert (await stream.error())["code"] == "rate_limit_exceeded"
        return stream

    return [found for found in await soon(refused(stream) for stream in flood) if found]


async def first_refused(streams: list[Stream]) -> Stream:
    """The first of them that gets an answer of any kind."""
    asked = {asyncio.ensure_future(stream.status()): stream for stream in streams}
    done, _ = await asyncio.wait(asked, timeout=WAIT_S, return_when=asyncio.FIRST_COMPLETED)
    for task in asked.keys() - done:
        task.cancel()
    (task,) = done
    return asked[task]


async def test_the_whole_queue_is_limited(server: Server, members: dict[str, str]) -> None:
    """At the platform's own limit, who has most waiting is told 503; others still find a place."""
    async with gated(server, slots=1), crowd(server, 1, key=members["ada"]) as running:
        await running[0].begun()
        async with crowd(server, OWN_QUEUE, key=members["ada"]) as floods:
            await until(server, queued=OWN_QUEUE)
            async with crowd(server, WHOLE_QUEUE - OWN_QUEUE, key=members["ben"]):
                await until(server, queued=WHOLE_QUEUE)
                async with Stream.asked(server, key=members["ada"]) as more:
                    assert (await more.error())["code"] == "rate_limit_exceeded"
                async with Stream.asked(server, key=members["cleo"]) as late:
                    refused = await first_refused(floods)
                    assert (await refused.error())["code"] == "overloaded"
                    assert await refused.status() == 503
                    assert int(refused.headers["retry-after"]) >= 1
                    await until(server, queued=WHOLE_QUEUE)
                    assert not late.reader.at_eof()
            await until(server, queued=OWN_QUEUE - 1)
        await until(server, queued=0)
    await until(server, running=0)


async def test_whoever_has_little_comes_next(server: Server, members: dict[str, str]) -> None:
    """A client without a key has a share of its own: while a member floods the only slot, it and
    another member are served next, before all but one of the flood that waits.
    """
    begun: asyncio.Queue[str] = asyncio.Queue()
    go_on = asyncio.Semaphore(0)

    async def play(talk: Talk) -> None:
        (message,) = talk.seen[-1].json["messages"]  # type: ignore[misc]
        await begun.put(message["content"])
        await go_on.acquire()
        await talk.say(stream("a"))

    async with asked_in_turn(server, play) as ask:
        await ask("flood", members["ada"], 60)
        await until(server, running=1, queued=59)
        await ask("anonymous", "", 1)
        await ask("ben", members["ben"], 1)
        await until(server, running=1, queued=61)
        order: list[str] = []
        async with asyncio.timeout(WAIT_S):
            for _ in range(6):
                order.append(await begun.get())
                go_on.release()
    assert {"anonymous", "ben"} <= set(order[1:4]), order
    assert order.count("flood") == 4


@asynccontextmanager
async def asked_in_turn(server: Server, play: Any) -> AsyncGenerator[Any]:
    """A way to ask one node with one slot; all who asked hang up at the end."""
    asked: list[Stream] = []

    async def ask(name: str, key: str, count: int) -> None:
        messages = [{"role": "user", "content": name}]
        asked.extend(
            await soon(Stream.ask(server, key=key, messages=messages) for _ in range(count))
        )

    async with listed(server, play, slots=1):
        try:
            yield ask
        finally:
            await soon(stream.leave() for stream in asked)
            await until(server, running=0, queued=0)


# Clients that leave: 13


class Leaver:
    """A member of its own of the real platform, so that its usage is what this test has used."""

    def __init__(self, server: Server, name: str) -> None:
        self.server = server
        self.name = name
        server.admin("POST", "/members", {"id": name})
        self.key: str = server.admin("POST", "/keys", {"member": name})["key"]

    def asked(self, **fields: Any) -> Any:
        """One stream of this member."""
        return Stream.asked(self.server, key=self.key, model=self.server.model, **fields)

    async def receipt(self, stream: Stream) -> dict[str, Any]:
        """The receipt of a request that has ended, once it is durable; the pool is idle then."""
        await until(self.server, running=0)
        found: list[dict[str, Any]] = []

        def durable() -> bool:
            with contextlib.suppress(AssertionError):
                found.append(self.server.receipt(stream.request))
            return bool(found)

        await asyncio.to_thread(wait_until, durable)
        return found[0]

    async def usage(self, requests: int) -> dict[str, Any]:
        """What this member has used, once so many requests have their receipt and all is free."""
        rows: list[dict[str, Any]] = []

        def settled() -> bool:
            rows[:] = self.server.admin("GET", f"/usage?member={self.name}")["usage"]
            return bool(rows) and rows[0]["requests"] == requests

        await asyncio.to_thread(wait_until, settled, within_s=WAIT_S)
        await until(self.server, running=0, queued=0)
        return rows[0]


LONG = {"messages": [{"role": "user", "content": "Tell a very long story."}], "max_tokens": 2_000}
BOOK = {"messages": [{"role": "user", "content": "It rained and rained. " * 500}]}


@pytest.mark.engine
async def test_leaving_the_queue(real: Server) -> None:
    """Who leaves while waiting is gone at once, and leaves a receipt of nothing."""
    leaver = Leaver(real, "queue")
    async with crowd(real, 1, model=real.model, **LONG) as (running,):
        await running.begun()
        for turn in range(3):
            async with leaver.asked(), leaver.asked():
                await until(real, running=1, queued=2)
            await until(real, running=1, queued=0)
            assert turn == 2 or await running.event() is not None
    usage = await leaver.usage(requests=6)
    assert usage["cancelled"] == 6
    assert usage["prompt_tokens"] == usage["completion_tokens"] == 0


@pytest.mark.engine
async def test_leaving_before_the_first_token(real: Server) -> None:
    """Who leaves while a long prompt is read stops that within a batch, and has got nothing."""
    leaver = Leaver(real, "prompt")
    for turn in range(3):
        messages = [{"role": "system", "content": f"{turn}"}, *BOOK["messages"]]
        async with leaver.asked(messages=messages) as asked:
            await until(real, running=1)
            assert not asked.seen
        await until(real, running=0)
    usage = await leaver.usage(requests=3)
    assert usage["cancelled"] == 3
    assert usage["completion_tokens"] == 0


@pytest.mark.engine
async def test_leaving_in_mid_answer(real: Server) -> None:
    """Who leaves in mid-answer stops the model; the receipt has what was sent until then."""
    leaver = Leaver(real, "middle")
    for _ in range(3):
        async with leaver.asked(**LONG) as asked:
            while asked.tokens < 5:
                assert await asked.event() is not None
            left_after = asked.tokens
        receipt = await leaver.receipt(asked)
        assert receipt["outcome"] == "cancelled"
        assert left_after <= receipt["usage"]["completion_tokens"] <= left_after + 30
        assert receipt["leases"][0]["completion_tokens"] <= left_after + 30
    assert (await leaver.usage(requests=3))["cancelled"] == 3


@pytest.mark.engine
async def test_leaving_between_the_last_token_and_the_end(real: Server) -> None:
    """Who leaves after the last token, before the end, has had it all: one receipt says so."""
    leaver = Leaver(real, "end")
    for _ in range(5):
        async with leaver.asked(**{**LONG, "max_tokens": 4}) as asked:
            while asked.tokens < 4:
                assert await asked.event() is not None
        receipt = await leaver.receipt(asked)
        assert receipt["outcome"] in {"cancelled", "finished"}
        assert receipt["usage"]["completion_tokens"] == 4
    await leaver.usage(requests=5)
    async with leaver.asked(**{**LONG, "max_tokens": 4}) as asked:
        await asked.rest()
    assert asked.whole, "the slot is as good as before"


# Large bodies: 52


def send_and_leave(server: Server, size: int, part: float) -> None:
    """Send a well-formed body of `size` bytes as far as `part` says, and hang up."""
    text = "x" * (size - 100)
    body = json.dumps({**HELLO, "messages": [{"role": "user", "content": text}]}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: application/json\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as sock:
        linger = struct.pack("ii", 1, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        with contextlib.suppress(ConnectionError):
            sock.sendall(head.encode() + body[: int(part * len(body))])


async def test_large_bodies_and_gone(server: Server) -> None:
    """Thirty clients at once send 5 MB each, whole or half, and leave: the platform answers
    others in the meantime, and nothing of it stays.
    """
    async with gated(server, slots=1), httpx.AsyncClient(base_url=server.url) as client:
        taken: list[float] = []
        sending = [
            asyncio.to_thread(send_and_leave, server, 5_000_000, 1.0 if number % 2 else 0.5)
            for number in range(30)
        ]
        leaving = asyncio.gather(*sending)
        while not leaving.done() or len(taken) < 20:
            began = time.monotonic()
            assert (await client.get("/health")).status_code == 200
            taken.append(time.monotonic() - began)
        await leaving
        await until(server, running=0, queued=0)
    print(f"health: median {statistics.median(taken):.4f} s, longest {max(taken):.4f} s")
    assert statistics.median(taken) < 0.1
    assert max(taken) < 2.0
