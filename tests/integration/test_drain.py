"""SIGTERM and SIGINT under load: what runs finishes, nothing new begins, and no receipt is lost."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from anser.adapters.memory_engine import MemoryEngine
from anser.core.hub import DEFAULT_MODEL
from anser.core.ledger import Outcome, Usage
from anser.ports import Call
from tests.hostile import Hostile, Talk
from tests.pool import demand, open_pool
from tests.server import Server, serving, serving_model, wait_until
from tests.streams import WAIT_S, Stream, crowd, gated, get, idlers, kept_receipts, soon

pytestmark = pytest.mark.anyio

MANY = 500
QUICK_S = 5.0  # what "quick" may take on a slow machine; the limits are several times as long
STORY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Tell a long story."}],
}


def twice(server: Server, number: signal.Signals) -> float:
    """Send the signal, and once it has been taken again; returns when."""
    server.process.send_signal(number)
    server.hear("stopping")
    server.process.send_signal(number)
    return time.monotonic()


async def ended(server: Server) -> int:
    """Wait for the process to end; its exit code."""
    return await asyncio.to_thread(server.process.wait, WAIT_S)


async def two_tokens(streams: list[Stream]) -> None:
    """Wait until each has had its first two tokens."""
    await soon(stream.begun() for stream in streams)
    await soon(stream.event() for stream in streams)


async def queued(server: Server, count: int) -> None:
    """Wait until so many requests queue."""
    await asyncio.to_thread(wait_until, lambda: server.pool()["queued"] == count)


def fetched(data_dir: Path) -> int:
    """How many bytes of models are on the disk."""
    files = [file for file in (data_dir / "blobs").rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_what_runs_and_waits_finishes(data_dir: Path, number: signal.Signals) -> None:
    """After a signal readiness fails and nothing new is admitted, while all that was admitted,
    also what still waits, comes to its proper end; then the process ends well, receipts written.
    """
    with serving(data_dir, "--no-engine") as server:
        async with gated(server, slots=20) as gate, crowd(server, 20) as running:
            await two_tokens(running)
            async with crowd(server, 5) as waiting:
                await queued(server, 5)
                server.process.send_signal(number)
                server.hear("stopping")
                ready = await get(server, "/ready")
                assert (ready.status_code, ready.json()["error"]["code"]) == (503, "shutting_down")
                assert (await get(server, "/health")).json()["draining"] is True
                async with Stream.asked(server) as late:
                    assert (await late.error())["code"] == "shutting_down"
                    assert await late.status() == 503
                    assert int(late.headers["retry-after"]) >= 1
                assert server.process.poll() is None
                gate.opened.set()
                streams = running + waiting
                await soon(stream.rest() for stream in streams)
                assert all(stream.whole for stream in streams)
                assert await ended(server) == 0
                server.hear("stopped")
    receipts = await kept_receipts(data_dir)
    assert receipts.keys() == {stream.request for stream in streams}
    assert {receipt.outcome for receipt in receipts.values()} == {Outcome.FINISHED}
    assert {receipt.usage.completion_tokens for receipt in receipts.values()} == {3}
    assert server.complaints == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_makes_it_quick(data_dir: Path, number: signal.Signals) -> None:
    """The second signal ends what runs with an honest error event, and what waits with 503; the
    receipts say cancelled, with the tokens that had been delivered.
    """
    with serving(data_dir, "--no-engine") as server:
        async with gated(server, slots=20), crowd(server, 20) as running:
            await two_tokens(running)
            async with crowd(server, 5) as waiting:
                await queued(server, 5)
                began = twice(server, number)
                refused = await soon(stream.error() for stream in waiting)
                await soon(stream.rest() for stream in running)
                assert await ended(server) == 0
                assert time.monotonic() - began < QUICK_S
    assert {error["code"] for error in refused} == {"shutting_down"}
    assert not any(stream.whole for stream in running)
    last = {json.loads(stream.seen[-1]).get("error", {}).get("code") for stream in running}
    assert last == {"shutting_down"}
    receipts = await kept_receipts(data_dir)
    assert receipts.keys() == {stream.request for stream in running + waiting}
    assert {receipt.outcome for receipt in receipts.values()} == {Outcome.CANCELLED}
    delivered = [receipts[stream.request].usage.completion_tokens for stream in running]
    assert delivered == [stream.tokens for stream in running] == [2] * 20
    assert {receipts[stream.request].usage for stream in waiting} == {Usage()}
    assert server.complaints == ""


async def test_the_time_to_drain_is_limited(data_dir: Path) -> None:
    """What has not ended by itself within server.drain_s is cut short, with its receipt."""
    environment = {"ANSER_SERVER_DRAIN_S": "0.5"}
    with serving(data_dir, "--no-engine", environment=environment) as server:
        async with gated(server, slots=2), crowd(server, 2) as streams:
            await two_tokens(streams)
            server.process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            await soon(stream.rest() for stream in streams)
            assert await ended(server) == 0
            assert 0.4 < time.monotonic() - began < 0.5 + 2 * QUICK_S
    receipts = await kept_receipts(data_dir)
    assert [receipts[stream.request].outcome for stream in streams] == [Outcome.CANCELLED] * 2


async def test_hundreds_of_streams_drain(data_dir: Path) -> None:
    """500 streams finish after SIGTERM; 500 idle connections, a hundred of them with half a head,
    hold nothing up.
    """
    environment = {"ANSER_MEMBERS_IN_FLIGHT_MAX": str(MANY)}
    with serving(data_dir, "--no-engine", environment=environment) as server:
        async with (
            gated(server, slots=MANY) as gate,
            crowd(server, MANY) as streams,
            idlers(server.port, MANY - 100),
            idlers(server.port, 100, say=b"GET /health HTTP/1.1\r\nHost:"),
        ):
            await two_tokens(streams)
            server.process.send_signal(signal.SIGTERM)
            server.hear("stopping")
            began = time.monotonic()
            gate.opened.set()
            await soon(stream.rest() for stream in streams)
            assert await ended(server) == 0
            assert time.monotonic() - began < 3 * QUICK_S
    assert all(stream.whole for stream in streams)
    assert len(await kept_receipts(data_dir)) == MANY


async def test_stopping_in_mid_download(data_dir: Path) -> None:
    """A signal while the model is still fetched ends cleanly at once; what has come is kept."""
    size = DEFAULT_MODEL.file.size_bytes
    environment = {"HF_HUB_OFFLINE": "1"}

    async def trickle(talk: Talk) -> None:
        while (await talk.request()).method == "HEAD":
            await talk.say(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        await talk.say(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        await talk.say(bytes(10**7))
        await talk.gone()

    async with Hostile(trickle) as mirror:
        environment["ANSER_ENGINE_MIRRORS"] = mirror.url
        with serving(data_dir, environment=environment) as server:
            await asyncio.to_thread(wait_until, lambda: fetched(data_dir) >= 10**6)
            assert (await get(server, "/ready")).status_code == 503
            async with Stream.asked(server, model=server.model) as waiting:
                await queued(server, 1)
                began = twice(server, signal.SIGTERM)
                assert (await waiting.error())["code"] == "shutting_down"
                assert await ended(server) == 0
                assert time.monotonic() - began < QUICK_S
    assert server.complaints == ""
    assert fetched(data_dir) >= 10**6


@pytest.mark.engine
async def test_stopping_while_the_model_loads(tmp_path: Path) -> None:
    """A signal while the model is loaded ends cleanly, wherever in the loading it comes."""
    for turn in range(3):
        with serving_model(tmp_path / str(turn), ready="listening") as server:
            await asyncio.sleep(0.15 * turn)
            server.process.send_signal(signal.SIGTERM)
            assert await ended(server) == 0
        assert server.complaints == ""


@pytest.mark.engine
async def test_real_answers_finish(tmp_path: Path) -> None:
    """With the real model: four answers run and two wait when SIGTERM comes; all are finished."""
    with serving_model(tmp_path / "data") as server:
        async with crowd(server, 6, **STORY, model=server.model, max_tokens=16) as streams:
            await streams[0].begun()
            server.process.send_signal(signal.SIGTERM)
            server.hear("stopping")
            await soon(stream.rest() for stream in streams)
            assert await ended(server) == 0
    assert all(stream.whole for stream in streams)
    receipts = await kept_receipts(tmp_path / "data")
    assert receipts.keys() == {stream.request for stream in streams}
    assert {receipt.outcome for receipt in receipts.values()} == {Outcome.FINISHED}
    assert server.complaints == ""


@pytest.mark.engine
async def test_real_answers_are_cut_short(tmp_path: Path) -> None:
    """With the real model: after two signals the engine is stopped in mid-answer, within moments,
    and each receipt has exactly the tokens that its client has seen.
    """
    with serving_model(tmp_path / "data") as server:
        async with crowd(server, 4, **STORY, model=server.model, max_tokens=3_000) as streams:
            await soon(stream.begun() for stream in streams)
            began = twice(server, signal.SIGTERM)
            await soon(stream.rest() for stream in streams)
            assert await ended(server) == 0
            assert time.monotonic() - began < QUICK_S
    receipts = await kept_receipts(tmp_path / "data")
    assert {receipt.outcome for receipt in receipts.values()} == {Outcome.CANCELLED}
    told = {request: receipt.usage.completion_tokens for request, receipt in receipts.items()}
    assert told == {stream.request: stream.tokens for stream in streams}
    assert server.complaints == ""


class Reluctant(MemoryEngine):
    """An engine whose answers do not stop before they are let go."""

    def __init__(self) -> None:
        super().__init__(slots=1)
        self.asked_to_stop = asyncio.Event()
        self.let_go = asyncio.Event()

    @asynccontextmanager
    async def generate(self, call: Call) -> AsyncGenerator[AsyncIterator[bytes]]:
        """Open one answer."""
        async with super().generate(call) as chunks:
            try:
                yield chunks
            finally:
                self.asked_to_stop.set()
                await self.let_go.wait()


async def test_cancelled_once_more_while_the_engine_stops() -> None:
    """A client leaves, its engine is slow to stop, and the platform closes meanwhile: the receipt
    is there nonetheless, and the slot is free.
    """
    engine = Reluctant()
    async with open_pool({"n": engine}) as pool:

        async def read() -> None:
            async with pool.gateway.answer(demand()) as answer:
                reading.set()
                async for _ in answer:
                    await engine.let_go.wait()

        reading = asyncio.Event()
        task = asyncio.ensure_future(read())
        async with asyncio.timeout(WAIT_S):
            await reading.wait()
        task.cancel()
        async with asyncio.timeout(WAIT_S):
            await engine.asked_to_stop.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pool.gateway.empty.is_set()
        (receipt,) = await pool.receipts()
        assert receipt.outcome is Outcome.CANCELLED
        assert pool.gateway.snapshot().running == 0
