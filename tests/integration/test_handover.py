"""A public socket that outlives its platform: an upgrade under load, and what else may happen."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from anser.wire.doors import Door
from anser.wire.server import GuardSettings
from tests.certificates import Pair, pair
from tests.guarded import Client, Guarded, post
from tests.hostile import Talk, stream
from tests.outside import HELLO, head, listed
from tests.server import HAND_OVER, Server, serving, wait_until
from tests.streams import WAIT_S, Gate, Stream, crowd, gated, get, idlers, kept_receipts, soon

pytestmark = pytest.mark.anyio

WORKERS = 8


@pytest.fixture
def holder() -> Iterator[socket.socket]:
    """A listening socket that belongs to no platform; what systemd holds for a socket unit."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as sock:
        yield sock


@dataclass(slots=True)
class Load:
    """Clients that ask without pause, each time on a new connection; nothing is tried twice."""

    port: int
    request: bytes
    tls: ssl.SSLContext | None = None
    answered: int = 0
    leaving: asyncio.Event = field(default_factory=asyncio.Event)
    done: asyncio.Event = field(default_factory=asyncio.Event)
    failures: list[str] = field(default_factory=list)

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Ask while the context is open; what has been asked is waited for."""
        async with asyncio.TaskGroup() as group:
            workers = [group.create_task(self._work()) for _ in range(WORKERS)]
            group.create_task(self._watch(workers))
            try:
                yield
            finally:
                self.leaving.set()

    async def _watch(self, workers: list[asyncio.Task[None]]) -> None:
        await asyncio.wait(workers)
        self.done.set()

    async def more(self, count: int) -> None:
        """Wait for so many more answers."""
        wanted = self.answered + count
        async with asyncio.timeout(WAIT_S):
            while self.answered < wanted:
                await asyncio.sleep(0.01)

    async def _work(self) -> None:
        while not self.leaving.is_set():
            try:
                async with asyncio.timeout(WAIT_S):
                    answer = await self._ask()
            except (OSError, EOFError) as error:
                self.failures.append(repr(error))
                continue
            if not answer.startswith(b"HTTP/1.1 200") or b"hel" not in answer:
                self.failures.append(answer[:200].decode(errors="replace"))
            self.answered += 1

    async def _ask(self) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=self.tls)
        try:
            writer.write(self.request)
            return await reader.read()
        finally:
            writer.close()


async def hello(talk_: Talk) -> None:
    """A node that says hello."""
    await talk_.say(stream("hel", "lo"))


def question(server: Server) -> bytes:
    """A chat request with the key of this platform, on a connection of its own."""
    body = json.dumps(HELLO).encode()
    return head(server, f"Content-Length: {len(body)}") + body


def stop(server: Server) -> None:
    """Let it retire."""
    server.process.send_signal(signal.SIGTERM)
    server.hear("stopping")


@asynccontextmanager
async def platform(
    data_dir: Path, holder: socket.socket, secure: Pair | None = None, **environment: str
) -> AsyncGenerator[Server]:
    """A platform on the holder's socket, started and ended beside the loop of this test."""
    environment |= {} if secure is None else secure.environment
    context = serving(data_dir, "--no-engine", environment=environment, handed=holder)
    server = await asyncio.to_thread(context.__enter__)
    try:
        yield server
    finally:
        await asyncio.to_thread(context.__exit__, None, None, None)


async def ended(server: Server) -> None:
    """Wait for its orderly end."""
    assert await asyncio.to_thread(server.process.wait, WAIT_S) == 0


@pytest.mark.parametrize("secure", [False, True])
async def test_an_upgrade_under_load_refuses_nobody(
    data_dir: Path, holder: socket.socket, secure: bool
) -> None:
    """Three platforms, one after the other, on one socket, and chats without pause: no connection
    is refused or reset and no answer is an error, with TLS as without.
    """
    made = pair(data_dir.parent) if secure else None
    async with platform(data_dir, holder, made) as first:
        assert first.port == holder.getsockname()[1]
        load = Load(first.port, question(first), None if made is None else made.trusting())
        async with listed(first, hello, slots=WORKERS), load.running():
            await load.more(50)
            await asyncio.to_thread(stop, first)
            await ended(first)
            async with platform(data_dir, holder, made) as second:
                await load.more(50)
                await asyncio.to_thread(stop, second)
                await ended(second)
                async with platform(data_dir, holder, made) as third:
                    await load.more(50)
                    load.leaving.set()
                    await load.done.wait()
                    assert third.process.poll() is None
    assert load.failures == []
    receipts = await kept_receipts(data_dir)
    assert len(receipts) == load.answered


async def test_streams_finish_and_who_comes_is_served_by_the_successor(
    data_dir: Path, holder: socket.socket
) -> None:
    """A successor that is started first waits for its predecessor, whose streams finish; who
    connects meanwhile waits in the socket and is answered by the successor.
    """
    gate = Gate()
    async with (
        platform(data_dir, holder) as first,
        listed(first, gate.play, slots=2, name="slow"),
        crowd(first, 2, model="slow") as streams,
        asyncio.TaskGroup() as group,
    ):
        await soon(stream.begun() for stream in streams)
        starting = group.create_task(_successor(data_dir, holder))
        waits = "a predecessor is waited for"
        await asyncio.to_thread(wait_until, lambda: waits in first.log.read_text(), within_s=WAIT_S)
        assert not starting.done()
        await asyncio.to_thread(stop, first)
        late = group.create_task(get(first, "/health"))
        await asyncio.sleep(0.5)
        assert not late.done()
        assert first.process.poll() is None
        gate.opened.set()
        await soon(stream.rest() for stream in streams)
        await ended(first)
        assert (await late).status_code == 200
    assert all(stream.whole for stream in streams)


async def _successor(data_dir: Path, holder: socket.socket) -> None:
    async with platform(data_dir, holder) as server:
        assert server.pool()["draining"] is False


async def test_a_folder_that_stays_held_ends_the_wait(
    data_dir: Path, holder: socket.socket
) -> None:
    """Who waits for its predecessor may be stopped; it names the folder and who holds it."""
    async with platform(data_dir, holder) as first:
        line = await asyncio.to_thread(_stopped_waiting, holder, data_dir)
        assert f"The data folder {data_dir} is in use" in line
        assert str(first.process.pid) in line
        assert (await get(first, "/health")).status_code == 200


def _stopped_waiting(sock: socket.socket, data_dir: Path) -> str:
    """What a platform says last that is stopped while it waits."""
    command = [sys.executable, "-c", HAND_OVER, str(sock.fileno()), sys.executable, "-m", "anser"]
    with subprocess.Popen(
        [*command, "serve", "--no-engine", "--data-dir", str(data_dir)],
        pass_fds=(sock.fileno(),),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        assert "a predecessor is waited for" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 1
        return process.stderr.read()


async def test_the_time_to_drain_is_limited(data_dir: Path, holder: socket.socket) -> None:
    """What has not ended within server.drain_s is cut short, as without a socket handed over; a
    second signal makes it quick.
    """
    for drain_s, signals in (("0.5", 1), ("60", 2)):
        async with (
            platform(data_dir, holder, ANSER_SERVER_DRAIN_S=drain_s) as server,
            gated(server, slots=1),
            Stream.asked(server) as stream,
        ):
            await stream.begun()
            for _ in range(signals):
                server.process.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.2)
            await stream.rest()
            await ended(server)
            assert "shutting_down" in stream.seen[-1]


async def test_idle_connections_hold_nothing_up(data_dir: Path, holder: socket.socket) -> None:
    """Kept and silent connections, and halves of heads, are closed; the successor need not wait."""
    async with platform(data_dir, holder) as server, idlers(server.port, 100):
        kept = httpx.AsyncClient(base_url=server.url)
        assert (await kept.get("/health")).status_code == 200
        began = asyncio.get_running_loop().time()
        await asyncio.to_thread(stop, server)
        await ended(server)
        assert asyncio.get_running_loop().time() - began < 8
        await kept.aclose()


async def test_a_door_lets_everybody_finish(holder: socket.socket) -> None:
    """asyncio's own loop (uvloop's runs above): of those connected when the door retires, who asks
    within a moment is answered once more and told that this was the last, and who idles is closed.
    """
    tiny = Guarded()
    tiny.port = holder.getsockname()[1]
    door = Door(tiny, holder.dup(), GuardSettings(head_timeout_s=3.0))
    async with asyncio.TaskGroup() as group, AsyncExitStack() as stack:
        group.create_task(door.serve())
        await door.opened.wait()
        fresh, half, busy, kept, idle, mute = [
            await stack.enter_async_context(Client.to(tiny)) for _ in range(6)
        ]
        half.send(post("/half")[:20])
        busy.send(post("/wait"))
        for client in (kept, idle):
            client.send(post("/first"))
            assert b"connection: close" not in (await client.answer())[1].lower()
        while "/wait" not in tiny.paths:
            await asyncio.sleep(0.01)
        retiring = group.create_task(door.retire())
        await asyncio.sleep(0)
        late = await stack.enter_async_context(Client.to(tiny))
        late.send(post("/late"))
        for client in (fresh, kept):
            client.send(post("/last"))
            assert b"connection: close" in (await client.answer())[1].lower()
            assert await client.closed()
        assert await idle.closed()
        assert await mute.closed()
        half.send(post("/half")[20:])
        assert (await half.answer())[2] == b"/half:0"
        assert await half.closed()
        assert not retiring.done()
        tiny.go.set()
        assert (await busy.answer())[2] == b"waited"
        assert await busy.closed()
        await retiring
        assert "/late" not in tiny.paths
        door.close(quickly=False)
        accepted, _ = holder.accept()  # the one who came late waits for whoever takes the socket
        with accepted:
            assert accepted.recv(100).startswith(b"POST /late")


async def test_the_address_is_that_of_the_socket(data_dir: Path) -> None:
    """What depends on the address goes by the socket's own, whatever the settings say: use without
    a key is for loopback alone, and SIGHUP does not change where it listens.
    """
    with socket.create_server(("0.0.0.0", 0)) as wide:
        async with platform(data_dir, wide, ANSER_SERVER_HOST="127.0.0.1") as server:
            assert server.port == wide.getsockname()[1]
            assert (await get(server, "/v1/models")).status_code == 401
            rows = (await asyncio.to_thread(server.admin, "GET", "/config"))["settings"]
            found = {row["path"]: (row["value"], row["source"]) for row in rows}
            assert found["server.host"] == ("0.0.0.0", "LISTEN_FDS")
            assert found["server.port"] == (server.port, "LISTEN_FDS")
            server.process.send_signal(signal.SIGHUP)
            await asyncio.to_thread(wait_until, lambda: "read anew" in server.complaints)
            assert "restart" not in server.complaints


def handed(sock: socket.socket, data_dir: Path, *, count: str = "1") -> str:
    """Why a platform does not start with this handed over."""
    hand_over = HAND_OVER.replace('"1"', f'"{count}"')
    command = [sys.executable, "-c", hand_over, str(sock.fileno()), sys.executable, "-m", "anser"]
    done = subprocess.run(
        [*command, "serve", "--no-engine", "--data-dir", str(data_dir)],
        pass_fds=(sock.fileno(),),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 1, done
    return done.stderr


def test_what_is_no_socket_for_it_stops_the_start(data_dir: Path, tmp_path: Path) -> None:
    """More than one, one that does not listen, one that is no TCP, and a file are refused."""
    with socket.socket() as mute:
        assert "2 sockets were handed over" in handed(mute, data_dir, count="2")
        assert "does not listen for TCP" in handed(mute, data_dir)
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "s"))
        unix.listen()
        assert "does not listen for TCP. Hand over one" in handed(unix, data_dir)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        assert "does not listen for TCP" in handed(datagrams, data_dir)
    reader, writer = os.pipe()
    os.close(writer)
    with socket.socket() as place:
        os.dup2(reader, place.fileno())
        os.close(reader)
        assert "is no socket" in handed(place, data_dir)


def test_a_socket_for_another_process_is_not_taken(data_dir: Path) -> None:
    """Variables that were meant for a parent are passed over."""
    environment = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
    with serving(data_dir, "--no-engine", environment=environment) as server:
        assert server.port > 0
