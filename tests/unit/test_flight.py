"""services.flight: an answer that its reader is told of, and the engines that tell of their own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from anser.adapters.memory_engine import MemoryEngine, Pace
from anser.config import GatewaySettings
from anser.core.errors import AnserError, EngineBroken, EngineRefused, EngineStalled
from anser.core.health import NodeState
from anser.core.ledger import Outcome
from anser.ports import Call, Receiver, Starter, Stream
from anser.services.chunks import Piece
from anser.services.flight import Flight
from anser.services.gateway import Demand
from tests.pool import Pool, demand, open_pool

pytestmark = pytest.mark.anyio

FAST = Pace(step_s=0.001, step_each_s=0.0, prefill_tokens_s=1e6)


def chunk(text: str = "", finish: str | None = None) -> bytes:
    """One chunk of a chat."""
    choice = {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": finish}
    return json.dumps({"object": "chat.completion.chunk", "choices": [choice]}).encode()


@dataclass
class Line(Stream):
    """One answer that a test speaks."""

    receiver: Receiver
    paused: bool = False
    aborted: bool = False
    hurried: bool = False
    stopped: Callable[[], None] | None = None  # held back where the engine is slow to stop
    slow: bool = False

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def abort(self, stopped: Callable[[], None]) -> None:
        assert not self.aborted, "aborted twice"
        self.aborted = True
        if self.slow:
            self.stopped = stopped
        else:
            stopped()

    def hurry(self) -> None:
        assert self.aborted
        self.hurried = True


class Caller(MemoryEngine, Starter):
    """An engine that tells what a test makes it tell."""

    def __init__(self, *, slow: bool = False, slots: int = 4) -> None:
        super().__init__(slots=slots, pace=FAST)
        self.slow = slow
        self.lines: list[Line] = []

    def start(self, call: Call, receiver: Receiver) -> Stream:
        """One answer, spoken later."""
        assert call.body["stream"] is True
        self.lines.append(Line(receiver, slow=self.slow))
        return self.lines[-1]


@dataclass
class Ear:
    """A reader that notes what it is told."""

    heard: list[str] = field(default_factory=list[str])
    error: AnserError | None = None
    flight: Flight | None = None
    enough: int = 10**9  # pieces after which it takes no more
    trouble: Exception | None = None  # what it raises at a piece

    def began(self) -> None:
        self.heard.append("began")

    def piece(self, piece: Piece) -> None:
        if self.trouble is not None:
            raise self.trouble
        self.heard.append(piece.text or piece.finish or "usage")
        if len(self.heard) > self.enough and self.flight is not None:
            self.flight.pause()

    def ended(self) -> None:
        self.heard.append("ended")

    def failed(self, error: AnserError) -> None:
        self.error = error
        self.heard.append("failed")


def listen(pool: Pool, ear: Ear, wanted: Demand | None = None) -> Flight:
    """Start an answer for this reader."""
    ear.flight = pool.gateway.start(wanted or demand(), ear)
    assert ear.heard == [], "told before it could know of what"
    return ear.flight


def say(line: Line, *chunks: bytes) -> None:
    """Speak."""
    for each in chunks:
        line.receiver.chunk(each)


async def test_a_reader_is_told_of_each_piece_as_it_comes() -> None:
    """Without a task, a piece is told in the very call that brings it; the end once it lasts."""
    node = Caller()
    async with open_pool({"a": node}) as pool:
        ear = Ear()
        flight = listen(pool, ear)
        [line] = node.lines
        say(line, chunk())
        assert ear.heard == []
        say(line, chunk("a"))
        assert ear.heard == ["began", "usage", "a"]
        assert (flight.node, flight.lease) == ("a", "r.1")
        say(line, chunk("b"), chunk("", "stop"))
        assert ear.heard[3:] == ["b"]
        line.receiver.ended()
        assert not flight.over
        await flight.gone()
        assert ear.heard[4:] == ["stop", "ended"]
        [receipt] = await pool.receipts()
        assert (receipt.outcome, receipt.usage.completion_tokens) == (Outcome.FINISHED, 2)
        flight.leave()
        await flight.gone()


async def test_a_reader_that_has_enough_is_told_no_more() -> None:
    """Nothing is passed on while paused, and its engine is told to wait; nothing of it is lost."""
    node = Caller()
    async with open_pool({"a": node}) as pool:
        ear = Ear(enough=1)
        flight = listen(pool, ear)
        [line] = node.lines
        say(line, chunk(), chunk("a"))
        assert (ear.heard, line.paused) == (["began", "usage"], True)
        flight.pause()
        flight.resume()  # one more is there, and it has enough again
        assert (ear.heard, line.paused) == (["began", "usage", "a"], True)
        ear.enough = 10**9
        flight.resume()
        flight.resume()
        assert not line.paused
        say(line, chunk("", "stop"))
        line.receiver.ended()
        await flight.gone()
        assert ear.heard[-2:] == ["stop", "ended"]


@pytest.mark.parametrize("said", [0, 1, 2])
async def test_a_reader_that_leaves_stops_the_engine_first(said: int) -> None:
    """Until the engine has stopped its slot is taken; then there is a receipt, and no word more."""
    node = Caller(slow=True)
    async with open_pool({"a": node}) as pool:
        ear = Ear()
        flight = listen(pool, ear)
        [line] = node.lines
        say(line, *(chunk("x") for _ in range(said)))
        heard = list(ear.heard)
        flight.leave()
        flight.leave()
        assert (pool.gateway.scheduler.running, line.aborted) == (1, True)
        assert line.stopped is not None
        line.stopped()
        assert (pool.gateway.scheduler.running, flight.over) == (0, True)
        assert ear.heard == heard
        [receipt] = await pool.receipts()
        assert (receipt.outcome, receipt.usage.completion_tokens) == (Outcome.CANCELLED, said)


async def test_a_reader_that_leaves_while_the_end_is_stored_finds_its_receipt() -> None:
    """What has been answered is receipted as such, though nobody is told."""
    node = Caller()
    async with open_pool({"a": node}) as pool:
        ear = Ear()
        flight = listen(pool, ear)
        [line] = node.lines
        say(line, chunk("a"), chunk("", "stop"))
        line.receiver.ended()
        flight.leave()
        await flight.gone()
        assert ear.heard == ["began", "a"]
        [receipt] = await pool.receipts()
        assert receipt.outcome is Outcome.FINISHED


async def test_who_leaves_while_its_engine_stops_is_cancelled() -> None:
    """Between a failure and what follows it, leaving still counts."""
    node = Caller(slow=True)
    async with open_pool({"a": node}) as pool:
        ear = Ear()
        flight = listen(pool, ear)
        [line] = node.lines
        line.receiver.failed(EngineBroken("gone"))
        flight.leave()
        assert line.stopped is not None
        line.stopped()
        assert len(node.lines) == 1, "asked again for nobody"
        [receipt] = await pool.receipts()
        assert receipt.outcome is Outcome.CANCELLED


async def test_a_piece_that_cannot_be_passed_on_fails_the_answer() -> None:
    """Its reader says so; the engine is stopped, and to blame."""
    node = Caller()
    async with open_pool({"a": node}) as pool:
        ear = Ear(trouble=EngineBroken("no chunk of mine"))
        flight = listen(pool, ear)
        say(node.lines[0], chunk("a"))
        await flight.gone()
        assert ear.heard == ["began", "failed"]
        assert node.lines[0].aborted
        [receipt] = await pool.receipts()
        assert (receipt.outcome, receipt.error) == (Outcome.FAILED, "engine_broken")


async def test_the_end_that_cannot_be_passed_on_is_told_as_such() -> None:
    """The receipt is there by then; its reader hears of a failure instead of an end."""
    node = Caller()
    async with open_pool({"a": node}) as pool:
        ear = Ear()
        flight = listen(pool, ear)
        say(node.lines[0], chunk("a"), chunk("", "stop"))
        ear.trouble = EngineBroken("no end of mine")
        node.lines[0].receiver.ended()
        await flight.gone()
        assert ear.heard == ["began", "a", "failed"]


@pytest.mark.parametrize("said", [1, 2])
async def test_a_readers_own_bug_is_its_own(said: int) -> None:
    """Whatever a reader raises, the call that told it returns, and its request ends as failed."""
    node = Caller()
    async with open_pool({"a": node}) as pool:
        ear = Ear()
        flight = listen(pool, ear)
        [line] = node.lines
        say(line, *(chunk("x") for _ in range(said - 1)))
        ear.trouble = ZeroDivisionError("a secret of the prompt")
        say(line, chunk("y"))
        await flight.gone()
        assert ear.heard[-1] == "failed"
        assert ear.error is not None
        assert "secret" not in ear.error.message
        [receipt] = await pool.receipts()
        assert receipt.outcome is Outcome.FAILED
        assert pool.gateway.scheduler.running == 0


async def test_a_bug_at_the_very_end_is_told() -> None:
    """Its receipt is durable; the reader still hears that something went wrong."""
    node = Caller()
    async with open_pool({"a": node}) as pool:
        ear = Ear()
        flight = listen(pool, ear)
        [line] = node.lines
        say(line, chunk("a"), chunk("", "stop"))
        ear.trouble = ZeroDivisionError()
        line.receiver.ended()
        await flight.gone()
        assert ear.heard == ["began", "a", "failed"]
        [receipt] = await pool.receipts()
        assert receipt.outcome is Outcome.FINISHED


async def test_an_engine_that_is_slow_to_stop_is_hurried() -> None:
    """Who can wait no longer cuts the engine's own end short; the slot is free only after that."""
    node = Caller(slow=True)
    async with open_pool({"a": node}) as pool:
        ear = Ear()
        flight = listen(pool, ear)
        [line] = node.lines
        say(line, chunk("a"))
        flight.leave()
        assert pool.gateway.scheduler.running == 1
        assert flight.hurry()
        assert line.hurried
        assert line.stopped is not None
        line.stopped()
        assert (flight.over, pool.gateway.scheduler.running) == (True, 0)
        assert not flight.hurry()
        [receipt] = await pool.receipts()
        assert receipt.outcome is Outcome.CANCELLED


async def test_what_comes_too_late_is_nobodys() -> None:
    """After a stop an engine's last words change nothing."""
    node = Caller(slow=True)
    async with open_pool({"a": node}) as pool:
        ear = Ear()
        flight = listen(pool, ear)
        [line] = node.lines
        say(line, chunk("a"))
        flight.leave()
        say(line, chunk("b"))
        line.receiver.ended()
        line.receiver.failed(EngineBroken("late"))
        assert ear.heard == ["began", "a"]
        assert line.stopped is not None
        line.stopped()
        [receipt] = await pool.receipts()
        assert receipt.outcome is Outcome.CANCELLED
        assert pool.fleet.status("a").state is NodeState.UP


async def test_a_node_that_fails_at_once_is_followed_by_another() -> None:
    """Unseen by the reader, in the very call that tells of the failure."""
    first, second = Caller(), Caller()
    async with open_pool({"a": first, "b": second}) as pool:
        ear = Ear()
        flight = listen(pool, ear)
        [line] = first.lines + second.lines
        line.receiver.failed(EngineBroken("gone"))
        [other] = [each for each in first.lines + second.lines if each is not line]
        say(other, chunk("a"), chunk("", "stop"))
        other.receiver.ended()
        await flight.gone()
        assert ear.heard == ["began", "a", "stop", "ended"]
        [receipt] = await pool.receipts()
        assert [lease.error for lease in receipt.leases] == ["engine_broken", None]


async def test_a_pause_is_not_an_engines_silence() -> None:
    """A client that takes nothing for longer than an engine may be silent loses nothing."""
    node = Caller()
    settings = GatewaySettings(token_gap_timeout_s=0.1, continue_answers=False)
    async with open_pool({"a": node}, settings=settings) as pool:
        ear = Ear(enough=1)
        flight = listen(pool, ear)
        say(node.lines[0], chunk("a"))
        await asyncio.sleep(0.3)
        assert not flight.over
        ear.enough = 10**9
        flight.resume()
        await flight.gone()
        assert isinstance(ear.error, EngineStalled)


class Odd(MemoryEngine):
    """An engine in this process that fails as none should."""

    def __init__(self, error: Exception, *, leaving: bool = False) -> None:
        super().__init__(slots=1, pace=FAST)
        self.error, self.leaving = error, leaving

    @asynccontextmanager
    async def generate(self, _call: Call) -> AsyncGenerator[AsyncIterator[bytes]]:
        """One word, then that."""
        yield self._speak()
        if self.leaving:
            raise self.error

    async def _speak(self) -> AsyncGenerator[bytes]:
        yield chunk("a")
        if not self.leaving:
            raise self.error
        yield chunk("", "stop")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ZeroDivisionError("a secret"), "internal_error"),
        (EngineRefused("no"), "engine_refused"),
    ],
)
@pytest.mark.parametrize("leaving", [False, True])
async def test_an_engine_that_raises_what_it_should_not(
    error: Exception, code: str, *, leaving: bool
) -> None:
    """The request fails and says nothing of it; slot and task are gone."""
    async with open_pool({"a": Odd(error, leaving=leaving)}) as pool:
        ear = Ear()
        flight = listen(pool, ear)
        await flight.gone()
        assert ear.heard[:2] == ["began", "a"]
        if code == "internal_error" and not leaving:
            assert ear.error is not None
            assert (ear.error.code, "secret" in ear.error.message) == (code, False)
        assert pool.gateway.scheduler.running == 0
        assert len(await pool.receipts()) == 1


async def test_an_engine_that_is_asked_stops_where_it_is_paused() -> None:
    """An engine in this process makes at most one chunk more than is read; leaving ends it."""
    made: list[int] = []

    class Counting(MemoryEngine):
        @asynccontextmanager
        async def generate(self, _call: Call) -> AsyncGenerator[AsyncIterator[bytes]]:
            try:
                yield self._speak()
            finally:
                made.append(-1)

        async def _speak(self) -> AsyncGenerator[bytes]:
            for number in range(1_000):
                made.append(number)
                yield chunk(f"{number} ")

    async with open_pool({"a": Counting(slots=1, pace=FAST)}) as pool:
        ear = Ear(enough=1)
        flight = listen(pool, ear, demand(output_tokens_max=5_000))
        await asyncio.sleep(0.05)
        assert (ear.heard, made) == (["began", "0 "], [0])
        flight.resume()
        await asyncio.sleep(0.05)
        assert (ear.heard, made) == (["began", "0 ", "1 "], [0, 1])
        flight.leave()
        await flight.gone()
        assert made == [0, 1, -1]


async def test_what_was_kept_and_not_read_is_not_receipted() -> None:
    """A client that is gone before it takes a piece has not had it."""
    node = Caller()
    async with open_pool({"a": node}) as pool:

        async def read() -> None:
            async with pool.gateway.answer(demand()) as answer:
                async for _ in answer:
                    pass

        reading = asyncio.ensure_future(read())
        await asyncio.sleep(0)
        say(node.lines[0], chunk("a"))
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        [receipt] = await pool.receipts()
        assert (receipt.outcome, receipt.usage.completion_tokens) == (Outcome.CANCELLED, 0)
