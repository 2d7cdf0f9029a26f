"""Crowds: thousands of slow connections, and strangers from many networks."""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.hostile import Talk, stream
from tests.outside import listed
from tests.server import Server, serving, wait_until
from tests.streams import WAIT_S, Peer, Stream, gated, idlers, soon
from tests.vitals import needs_proc, open_files

pytestmark = pytest.mark.anyio

HEAD_TIMEOUT_S = 8.0
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n"
MANY = 300  # networks


@pytest.fixture
def files() -> Iterator[None]:
    """As many open files as the machine allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def well(talk: Talk) -> None:
    """An answer at once."""
    await talk.say(stream("all ", "well"))


async def answered(server: Server, key: str | None = None) -> float:
    """Ask, and read the whole answer: how long it took, in seconds."""
    began = time.monotonic()
    async with Stream.asked(server, key=key) as asked:
        await asked.rest()
        assert asked.whole
    return time.monotonic() - began


@needs_proc
@pytest.mark.slow
@pytest.mark.usefixtures("files")
async def test_thousands_that_trickle_leave_others_unharmed(tmp_path: Path) -> None:
    """5,000 connections send their heads byte by byte: others are answered meanwhile, each of the
    5,000 is refused or closed in its time, and nothing of them is left.
    """
    environment = {"ANSER_SERVER_HEAD_TIMEOUT_S": str(HEAD_TIMEOUT_S)}
    with serving(tmp_path / "data", "--no-engine", environment=environment) as server:
        before = open_files(server.process.pid)
        async with listed(server, well), idlers(server.port, 5_000, say=HEAD[:1]) as slow:
            longest = 0.0
            for byte in HEAD[1:9]:
                for _, writer in slow:
                    writer.write(bytes([byte]))
                longest = max(longest, await answered(server))
            said = await soon(map(ending, slow))
            longest = max(longest, await answered(server))
        assert {answer[:13] for answer in said} <= {b"HTTP/1.1 408 ", b""}
        assert said.count(b"") < 100
        assert longest < HEAD_TIMEOUT_S / 2
        await asyncio.to_thread(
            wait_until, lambda: open_files(server.process.pid) < before + 50, within_s=WAIT_S
        )


async def ending(peer: Peer) -> bytes:
    """All that comes until the connection ends."""
    try:
        return await peer[0].read()
    except ConnectionError:
        return b""


@needs_proc
async def test_strangers_of_many_networks_go_not_before_members(tmp_path: Path) -> None:
    """While clients without a key wait for the only slot, each from a network of its own, members
    who ask one thing after the other are next each time.
    """
    begun: asyncio.Queue[str] = asyncio.Queue()
    go_on = asyncio.Semaphore(0)

    async def play(talk: Talk) -> None:
        (message,) = talk.seen[-1].json["messages"]  # type: ignore[misc]
        await begun.put(message["content"])
        await go_on.acquire()
        await well(talk)

    with serving(tmp_path / "data", "--no-engine") as server:

        async def ask(name: str, key: str, source: str | None = None) -> Stream:
            messages = [{"role": "user", "content": name}]
            return await Stream.ask(server, key=key, source=source, messages=messages)

        async def queued(count: int) -> None:
            await asyncio.to_thread(wait_until, lambda: server.pool()["queued"] == count)

        keys = {name: member_of(server, name) for name in ("ada", "ben")}
        async with listed(server, play, slots=1), AsyncExitStack() as stack:
            sources = [f"127.{number // 200 + 1}.{number % 200 + 1}.1" for number in range(MANY)]
            for stranger in await soon(ask("stranger", "", source) for source in sources):
                stack.push_async_callback(stranger.leave)
            await queued(MANY - 1)
            for _ in range(4):
                waiting = server.pool()["queued"]
                for asked in await soon(ask(name, key) for name, key in keys.items()):
                    stack.push_async_callback(asked.leave)
                await queued(waiting + len(keys))
                order: list[str] = []
                async with asyncio.timeout(WAIT_S):
                    while not keys.keys() <= set(order):
                        go_on.release()
                        order.append(await begun.get())
                assert order.count("stranger") <= 3, order


def member_of(server: Server, name: str) -> str:
    """The key of a new member."""
    server.admin("POST", "/members", {"id": name})
    key: str = server.admin("POST", "/keys", {"member": name})["key"]
    return key


@needs_proc
async def test_strangers_of_many_networks_have_one_share(tmp_path: Path) -> None:
    """Clients without a key, from however many networks, share the only slot with a member who has
    much waiting as one party does with another.
    """
    begun: asyncio.Queue[str] = asyncio.Queue()
    go_on = asyncio.Semaphore(0)

    async def play(talk: Talk) -> None:
        (message,) = talk.seen[-1].json["messages"]  # type: ignore[misc]
        await begun.put(message["content"])
        await go_on.acquire()
        await well(talk)

    with serving(tmp_path / "data", "--no-engine") as server:
        ada = member_of(server, "ada")

        async def ask(name: str, key: str, source: str | None = None) -> None:
            messages = [{"role": "user", "content": name}]
            asked = await Stream.ask(server, key=key, source=source, messages=messages)
            stack.push_async_callback(asked.leave)

        async def queued(count: int) -> None:
            await asyncio.to_thread(wait_until, lambda: server.pool()["queued"] == count)

        async with listed(server, play, slots=1), AsyncExitStack() as stack:
            await soon(ask("stranger", "", f"127.1.{number}.1") for number in range(100))
            await queued(99)
            await soon(ask("ada", ada) for _ in range(8))
            await queued(107)
            order: list[str] = []
            async with asyncio.timeout(WAIT_S):
                for _ in range(21):
                    go_on.release()
                    order.append(await begun.get())
            assert order.count("ada") >= 7, order


async def test_flex_is_shed_first(tmp_path: Path) -> None:
    """At the platform's queue limit what waits as `flex` is refused before anything else."""
    environment = {"ANSER_GATEWAY_QUEUED_MAX": "6"}
    with serving(tmp_path / "data", "--no-engine", environment=environment) as server:
        ben = member_of(server, "ben")

        async def ask(**more: object) -> Stream:
            asked = await Stream.ask(server, **more)  # type: ignore[arg-type]
            stack.push_async_callback(asked.leave)
            return asked

        async def queued(count: int) -> None:
            await asyncio.to_thread(wait_until, lambda: server.pool()["queued"] == count)

        async with gated(server, slots=1), AsyncExitStack() as stack:
            await (await ask()).begun()
            flex = [await ask(key=ben, service_tier="flex") for _ in range(2)]
            await queued(2)
            usual = [await ask() for _ in range(4)]
            await queued(6)
            await ask()
            waits = {asyncio.ensure_future(each.status()): each for each in [*flex, *usual]}
            done, rest = await asyncio.wait(
                waits, timeout=WAIT_S, return_when=asyncio.FIRST_COMPLETED
            )
            for wait in rest:
                wait.cancel()
            assert {waits[each] in flex for each in done} == {True}
