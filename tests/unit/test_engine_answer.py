"""One answer of an engine: what its receiver is told, whatever it does from within the telling."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from anser.adapters.engine_answer import Answer
from anser.adapters.engine_http import HttpEngine
from anser.core.errors import EngineBroken, EngineDeclined, EngineError, EngineUnreachable
from anser.core.fleet import Node
from anser.wire.connection import Head
from anser.wire.upstream import Bounds
from tests.hostile import SSE_HEAD, Hostile, Talk, delta, event, stream
from tests.hostile_engine import CALL, chunks_of, engine_for, saying, text_of

pytestmark = pytest.mark.anyio

SOON_S = 10.0  # generous: what hangs takes for ever
HEAD = Head(200, [(b"content-type", b"text/event-stream; charset=utf-8")], until_eof=False)
FINISH = b'{"choices":[{"finish_reason":"stop"}]}'
USAGE = b'{"choices":[],"usage":{"total_tokens":5}}'
DONE = b"[DONE]"


class Told:
    """A receiver that keeps what it is told; `on` is called with each, from within the call."""

    def __init__(self, on: Callable[[str], None] | None = None) -> None:
        self.told: list[str] = []
        self.chunks: list[bytes] = []
        self.error: EngineError | None = None
        self.begun = asyncio.Event()
        self.over = asyncio.Event()
        self._on = on

    def chunk(self, data: bytes) -> None:
        self.chunks.append(data)
        self.begun.set()
        self._tell("chunk")

    def ended(self) -> None:
        self.over.set()
        self._tell("ended")

    def failed(self, error: EngineError) -> None:
        self.error = error
        self.over.set()
        self._tell("failed")

    def _tell(self, what: str) -> None:
        self.told.append(what)
        if self._on is not None:
            self._on(what)


def word(number: int) -> bytes:
    return b'{"choices":[{"delta":{"content":"%d"}}]}' % number


def packet(*payloads: bytes) -> bytes:
    return b"".join(b"data: " + payload + b"\n\n" for payload in payloads)


def answering(on: Callable[[str], None] | None = None) -> tuple[Answer, Told]:
    """A stream whose head has come."""
    told = Told(on)
    answer = Answer(told, None)
    answer.head(HEAD)
    return answer, told


def aborted(answer: Answer) -> None:
    """Abort, and check that the engine has stopped at once."""
    stopped: list[bool] = []
    answer.abort(lambda: stopped.append(True))
    assert stopped == [True]


async def ended(told: Told) -> list[str]:
    """All that it was told, once it has heard the end, and a while after that."""
    async with asyncio.timeout(SOON_S):
        await told.over.wait()
    await asyncio.sleep(0.02)
    return told.told


# In one packet


async def test_a_packet_is_told_at_once_and_in_order() -> None:
    """Each chunk that has come is told within the call that brought it, then the end, once."""
    answer, told = answering()
    answer.data(packet(word(1), word(2)))
    assert told.chunks == [word(1), word(2)]
    answer.data(packet(FINISH, USAGE, DONE, word(3)))
    assert told.told == ["chunk"] * 4 + ["ended"]
    answer.data(packet(word(4)))
    answer.complete()
    answer.failed(EngineBroken("late"))
    assert told.told == ["chunk"] * 4 + ["ended"]
    assert repr(answer).startswith("<Answer waiting=0 finished=True used=True over=True")


async def test_aborting_within_a_packet_drops_the_rest() -> None:
    """Whoever aborts from within a call hears no more, not even of what has already come."""
    answer, told = answering(lambda _: aborted(answer))
    answer.data(packet(word(1), word(2), FINISH, USAGE, DONE))
    answer.data(packet(word(3)))
    answer.complete()
    answer.resume()
    assert told.told == ["chunk"]


@pytest.mark.parametrize("last", ["ended", "failed"])
async def test_aborting_from_within_the_end(last: str) -> None:
    """An answer that has ended is aborted without harm, and has stopped at once."""
    answer, told = answering(lambda what: aborted(answer) if what == last else None)
    answer.data(packet(word(1), *([DONE] if last == "ended" else [b"broken"])))
    assert told.told == ["chunk", last]
    aborted(answer)


async def test_pausing_within_a_packet_keeps_the_rest() -> None:
    """A receiver that pauses is told nothing until it resumes; the end waits for the chunks."""
    answer, told = answering(lambda _: answer.pause())
    answer.data(packet(word(1), word(2), DONE))
    assert told.chunks == [word(1)]
    answer.pause()
    answer.resume()
    assert told.chunks == [word(1), word(2)]
    assert told.told == ["chunk", "chunk"]
    answer.resume()
    answer.resume()
    assert told.told == ["chunk", "chunk", "ended"]


async def test_a_failure_waits_for_the_chunks_before_it() -> None:
    """Paused or not, what was sound is told before what was not."""
    answer, told = answering(lambda _: answer.pause())
    answer.data(packet(word(1), word(2), b"broken", word(3)))
    answer.failed(EngineUnreachable("and gone"))
    assert told.told == ["chunk"]
    answer.resume()
    answer.resume()
    assert told.told == ["chunk", "chunk", "failed"]
    assert isinstance(told.error, EngineBroken)


async def test_aborting_while_paused() -> None:
    """What waits is dropped."""
    answer, told = answering(lambda _: answer.pause())
    answer.data(packet(word(1), word(2), DONE))
    aborted(answer)
    answer.resume()
    assert told.told == ["chunk"]


async def test_resuming_within_a_call_does_not_nest() -> None:
    """Pausing and resuming from within each of many calls neither reorders nor recurses."""
    depth = deepest = 0

    def on(_: str) -> None:
        nonlocal depth, deepest
        depth += 1
        deepest = max(deepest, depth)
        answer.pause()
        answer.resume()
        depth -= 1

    answer, told = answering(on)
    words = [word(number) for number in range(5_000)]
    answer.data(packet(*words, DONE))
    assert told.chunks == words
    assert (told.told[-1], deepest) == ("ended", 1)


async def test_a_receiver_that_fails_is_not_told_out_of_turn() -> None:
    """Its failure reaches whoever called; the stream can be ended after that."""

    def on(what: str) -> None:
        if what == "chunk":
            raise LookupError(what)

    answer, told = answering(on)
    with pytest.raises(LookupError):
        answer.data(packet(word(1)))
    answer.failed(EngineBroken("The connection is closed."))
    assert told.told == ["chunk", "failed"]


async def test_usage_apart_is_told_before_the_end() -> None:
    """Usage that came with the finish is told once, last of the chunks, or not at all."""
    both = b'{"choices":[{"finish_reason":"stop"}],"usage":{"total_tokens":5}}'
    answer, told = answering(lambda _: answer.pause())
    answer.data(packet(both, DONE))
    answer.resume()
    answer.resume()
    assert told.told == ["chunk", "chunk", "ended"]
    assert json.loads(told.chunks[1]) == {"choices": [], "usage": {"total_tokens": 5}}
    broken, told = answering()
    broken.data(packet(word(1)) + b"data: " + both)
    broken.complete()
    assert told.told == ["chunk", "chunk", "chunk", "ended"]


async def test_a_last_event_without_its_blank_line() -> None:
    """It is taken when the body ends, and must be as sound as any."""
    for last, told_last in [(DONE, "ended"), (word(2), "failed"), (b"broken", "failed")]:
        answer, told = answering()
        answer.data(packet(word(1)) + b"data: " + last)
        answer.complete()
        assert told.told == ["chunk"] * (2 if last == word(2) else 1) + [told_last]


# What is no stream


@pytest.mark.parametrize("status", [200, 500])
async def test_what_is_no_stream_and_breaks_off(status: int) -> None:
    """An error's status alone does where its body breaks off; a 200 is what broke it off."""
    told = Told()
    answer = Answer(told, None)
    answer.head(Head(status, [(b"content-type", b"application/json")], until_eof=False))
    answer.data(b'{"error": {"message": "wo')
    answer.failed(EngineUnreachable("gone"))
    assert told.told == ["failed"]
    assert isinstance(told.error, EngineUnreachable if status == 200 else EngineBroken)


async def test_what_is_no_stream_is_read_up_to_a_limit() -> None:
    """One document with status 200 that is too long is told as such; nothing of it is kept."""
    told = Told()
    answer = Answer(told, None)
    answer.head(Head(200, [(b"content-type", b"application/json")], until_eof=False))
    answer.data(b"x" * 65_536)
    assert told.told == []
    answer.data(b"x")
    assert told.told == ["failed"]
    assert "more than 65536 bytes" in str(told.error)


# Over a connection


async def test_a_started_answer_is_told() -> None:
    """Nothing before `start` has returned; then the chunks and the end, again and again."""

    async def script(talk: Talk) -> None:
        while True:
            await talk.request()
            await talk.say(stream("a", "b"))

    async with engine_for(script) as (hostile, engine):
        for _ in range(3):
            told = Told()
            engine.start(CALL, told)
            assert told.told == []
            assert await ended(told) == ["chunk"] * 4 + ["ended"]
            assert text_of(told.chunks) == "ab"
        assert hostile.connections == 1
        assert hostile.seen[0] == hostile.seen[2]


async def test_a_failure_is_told_and_not_raised(tmp_path: Path) -> None:
    """Nobody there, or a key that cannot be used: told once, after `start` has returned."""
    async with Hostile(saying()) as hostile:
        url = hostile.url
    no_key = Node(id="n", url=url, key_file=str(tmp_path / "none"))
    for node, kind in [(Node(id="n", url=url), EngineUnreachable), (no_key, EngineDeclined)]:
        engine = HttpEngine(node)
        told, left = Told(), Told()
        engine.start(CALL, told)
        aborted(engine.start(CALL, left))
        assert told.told == []
        assert await ended(told) == ["failed"]
        assert type(told.error) is kind
        assert str(tmp_path) not in str(told.error)
        assert left.told == []
        await engine.aclose()


@pytest.mark.parametrize("said", [[], [SSE_HEAD], [SSE_HEAD, delta("a")]])
async def test_aborting_hangs_up_on_the_engine(said: list[bytes]) -> None:
    """Before the head, after it and in mid-stream, an abort closes the connection."""
    gone = asyncio.Event()

    async def script(talk: Talk) -> None:
        await talk.request()
        await talk.say(*said)
        if await talk.gone():
            gone.set()

    async with engine_for(script) as (hostile, engine):
        told = Told()
        answer = engine.start(CALL, told)
        async with asyncio.timeout(SOON_S):
            while not hostile.seen or len(told.told) < len(said) - 1:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            before = list(told.told)
            aborted(answer)
            assert "open=0" in repr(engine)
            await gone.wait()
        assert told.told == before


async def test_aborting_while_it_is_dialled() -> None:
    """The dial is given up, and nothing is told."""

    async def mute(talk: Talk) -> None:
        await talk.gone()  # accepts, and never answers the TLS hello

    async with Hostile(mute) as hostile:
        engine = HttpEngine(Node(id="n", url=hostile.url.replace("http:", "https:")))
        told = Told()
        answer = engine.start(CALL, told)
        await asyncio.sleep(0.05)
        aborted(answer)
        await asyncio.sleep(0.05)
        assert told.told == []
        assert "open=0 idle=0 dialling=0" in repr(engine)


async def test_aborting_what_waits_after_its_end_keeps_the_connection() -> None:
    """Once [DONE] has come the engine has stopped by itself: nothing is cut."""

    async def late(talk: Talk) -> None:
        while True:
            await talk.request()
            await talk.say(stream("a", "b").removesuffix(b"0\r\n\r\n"))
            await asyncio.sleep(0.05)
            await talk.say(b"0\r\n\r\n")

    async with engine_for(late) as (hostile, engine):
        for _ in range(3):
            answer, told = pausing(engine)
            async with asyncio.timeout(SOON_S):
                await told.begun.wait()
            await asyncio.sleep(0.02)
            aborted(answer)
            await asyncio.sleep(0.1)
            assert told.told == ["chunk"]
        assert hostile.connections == 1


def pausing(engine: HttpEngine) -> tuple[Answer, Told]:
    """An answer whose receiver pauses with each chunk."""
    told = Told(lambda _: answer.pause())
    answer = engine.start(CALL, told)
    return answer, told


async def test_starting_anew_from_within_the_end() -> None:
    """The connection of an answer that has ended serves the next one at once."""

    async def script(talk: Talk) -> None:
        while True:
            await talk.request()
            await talk.say(stream("a"))

    async with engine_for(script) as (hostile, engine):
        second = Told()

        def on(what: str) -> None:
            if what == "ended":
                engine.start(CALL, second)

        engine.start(CALL, Told(on))
        assert (await ended(second))[-1] == "ended"
        assert hostile.connections == 1


async def test_a_paused_answer_stops_its_engine() -> None:
    """While a receiver pauses, the engine cannot send; when it resumes, all comes."""
    sent = 0
    words = 200

    async def pouring(talk: Talk) -> None:
        nonlocal sent
        await talk.request()
        await talk.say(SSE_HEAD)
        for _ in range(words):
            await talk.say(event(b'{"choices":[],"x":"%b"}' % (b"x" * 65_536)))
            sent += 1
        await talk.say(event(DONE) + b"0\r\n\r\n")

    async with engine_for(pouring) as (_, engine):
        told = Told(lambda _: None if going else answer.pause())
        going = False
        answer = engine.start(CALL, told)
        await asyncio.sleep(0.3)
        assert told.told == ["chunk"]
        assert sent < words
        going = True
        answer.resume()
        assert await ended(told) == ["chunk"] * words + ["ended"]


async def test_a_slow_reader_of_an_answer_stops_its_engine() -> None:
    """`generate` holds little of what is unread, and loses nothing."""
    sent = 0
    words = 400

    async def pouring(talk: Talk) -> None:
        nonlocal sent
        await talk.request()
        await talk.say(SSE_HEAD)
        for _ in range(words):
            await talk.say(event(b'{"choices":[],"x":"%b"}' % (b"x" * 65_536)))
            sent += 1
        await talk.say(event(DONE) + b"0\r\n\r\n")

    async with engine_for(pouring) as (_, engine), engine.generate(CALL) as chunks:
        await anext(chunks)
        await asyncio.sleep(0.3)
        assert int(repr(chunks).split("unread=")[1].split()[0]) < 1 << 20
        assert sent < words
        assert len([chunk async for chunk in chunks]) == words - 1
        assert "unread=0" in repr(chunks)


async def test_a_closing_engine_tells_all_who_receive() -> None:
    """Every answer under way ends with an error, told once."""
    script = saying(SSE_HEAD, delta("a"), stay=True)
    async with engine_for(script, bounds=Bounds(connections_max=9)) as (_, engine):
        receivers = [Told() for _ in range(5)]
        for each in receivers:
            engine.start(CALL, each)
        async with asyncio.timeout(SOON_S):
            for each in receivers:
                await each.begun.wait()
        await engine.aclose()
        for each in receivers:
            assert await ended(each) == ["chunk", "failed"]
            assert isinstance(each.error, EngineUnreachable)
        with pytest.raises(EngineUnreachable):
            await chunks_of(engine)
