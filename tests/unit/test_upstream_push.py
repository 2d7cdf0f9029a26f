"""The pooled HTTP/1.1 client as listeners see it: told of answers by calls, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from anser.core.errors import EngineBroken, EngineError, EngineStalled, EngineUnreachable
from anser.wire.connection import Head, Question
from anser.wire.upstream import Bounds, Origin, Upstream
from tests.hostile import SSE_HEAD, Hostile, Talk, answer, chunked
from tests.unit.test_upstream import always, saying, talking

pytestmark = pytest.mark.anyio

SOON_S = 10.0  # generous: what hangs takes for ever


class Heard:
    """A listener that keeps what it is told; `on` is called with each, from within the call."""

    def __init__(self, on: Callable[[str], None] | None = None) -> None:
        self.told: list[str] = []
        self.body = bytearray()
        self.error: EngineError | None = None
        self.begun = asyncio.Event()
        self.over = asyncio.Event()
        self._on = on

    def head(self, head: Head) -> None:
        self._tell(f"head {head.status}")

    def data(self, data: bytes) -> None:
        self.body += data
        self.begun.set()
        self._tell("data")

    def complete(self) -> None:
        self.over.set()
        self._tell("complete")

    def failed(self, error: EngineError) -> None:
        self.error = error
        self.over.set()
        self._tell("failed")

    def _tell(self, what: str) -> None:
        self.told.append(what)
        if self._on is not None:
            self._on(what)


def ask(upstream: Upstream, heard: Heard, path: str = "/", body: bytes | None = None) -> Question:
    """Ask, and check that nothing is told before the asking has returned."""
    before = list(heard.told)
    question = upstream.ask(upstream.start_of("POST" if body else "GET", path), body, heard)
    assert heard.told == before
    return question


async def ended(heard: Heard) -> list[str]:
    """All that it was told, once it has heard the end, and a while after that."""
    async with asyncio.timeout(SOON_S):
        await heard.over.wait()
    await asyncio.sleep(0.02)
    return heard.told


async def test_a_listener_is_told_of_the_answer() -> None:
    """Head, body and end come by calls, in this order, whether it was dialled for or not."""
    async with talking(always) as (hostile, upstream):
        for number in range(3):
            heard = Heard()
            question = ask(upstream, heard, f"/{number}", b"{}")
            assert await ended(heard) == ["head 200", "data", "complete"]
            assert heard.body == b"/%d:{}" % number
            assert repr(question) == "<Question None listening=False>"
        assert hostile.connections == 1


async def test_an_idle_connection_is_asked_without_a_task() -> None:
    """Only who must dial needs a task; what is asked on a kept connection is written at once."""
    async with talking(always) as (_, upstream):
        first = Heard()
        ask(upstream, first)
        assert "dialling=1" in repr(upstream)
        await ended(first)
        tasks = asyncio.all_tasks()
        second = Heard()
        ask(upstream, second)
        assert asyncio.all_tasks() == tasks
        assert "idle=0" in repr(upstream)
        assert (await ended(second))[-1] == "complete"


async def test_a_large_body_arrives_whole() -> None:
    """A body is joined to its head or not, by its size; the upstream sees the same."""
    async with talking(always) as (_, upstream):
        for size in (1, 65_536, 65_537, 1 << 20):
            heard = Heard()
            ask(upstream, heard, "/", b"x" * size)
            await ended(heard)
            assert len(heard.body) == size + len("/:")


async def test_a_dial_that_fails_is_told() -> None:
    """Nobody there, no room for a connection, or closed: told once, after the asking."""
    async with Hostile(always) as hostile:
        origin = Origin(scheme="http", host="127.0.0.1", port=hostile.port)
    refused = Upstream(origin)
    full = Upstream(origin, bounds=Bounds(connections_max=0))
    closed = Upstream(origin)
    await closed.aclose()
    for upstream, why in [(refused, "refused"), (full, "as many"), (closed, "closed")]:
        heard = Heard()
        ask(upstream, heard)
        assert await ended(heard) == ["failed"]
        assert isinstance(heard.error, EngineUnreachable)
        assert why in heard.error.message
        left = Heard()
        ask(upstream, left).close()
        await asyncio.sleep(0.05)
        assert left.told == []


async def test_a_stale_connection_is_replaced_once_for_a_listener() -> None:
    """A kept connection that had been dropped costs no request; a fresh one is not tried again."""

    async def once(talk: Talk) -> None:
        seen = await talk.request()
        if seen.path == "/never":
            return
        await talk.say(answer(b"1"))
        await talk.request()  # and drops the connection unanswered

    async with talking(once) as (hostile, upstream):
        for path in ("/1", "/2", "/never"):
            heard = Heard()
            ask(upstream, heard, path, b"{}")
            told = await ended(heard)
            assert told[-1] == ("complete" if path != "/never" else "failed")
        assert [seen.path for seen in hostile.seen] == ["/1", "/2", "/2", "/never", "/never"]
        assert hostile.connections == 3
        assert isinstance(heard.error, EngineUnreachable)


async def test_who_leaves_while_a_dropped_connection_is_replaced() -> None:
    """The second dial is given up like the first."""

    async def once(talk: Talk) -> None:
        await talk.request()
        await talk.say(answer(b"1"))
        await talk.request()

    async with talking(once) as (hostile, upstream):
        await ended_well(upstream)
        heard = Heard()
        question = ask(upstream, heard)
        async with asyncio.timeout(SOON_S):
            while "dialling=1" not in repr(upstream):
                await asyncio.sleep(0)
        question.close()
        await asyncio.sleep(0.05)
        assert heard.told == []
        assert repr(upstream).endswith("open=0 idle=0 dialling=0>")
        assert len(hostile.seen) == 2


async def ended_well(upstream: Upstream) -> None:
    heard = Heard()
    ask(upstream, heard)
    assert (await ended(heard))[-1] == "complete"


async def test_leaving_while_it_is_dialled() -> None:
    """The dial is given up, and nothing is told."""

    async def mute(talk: Talk) -> None:
        await talk.gone()  # accepts, and never answers the TLS hello

    async with Hostile(mute) as hostile:
        upstream = Upstream(Origin(scheme="https", host="127.0.0.1", port=hostile.port))
        for wait_s in (0.0, 0.05):
            heard = Heard()
            question = ask(upstream, heard)
            await asyncio.sleep(wait_s)
            question.close()
            question.close()
            assert repr(upstream).endswith("open=0 idle=0 dialling=0>")
            await asyncio.sleep(0.05)
            assert heard.told == []


@pytest.mark.parametrize("said", [[], [SSE_HEAD], [SSE_HEAD, chunked(b"a")]])
async def test_leaving_before_the_end_hangs_up(said: list[bytes]) -> None:
    """Before the head, after it or within the body: the upstream sees it, the listener nothing."""
    gone = asyncio.Event()

    async def script(talk: Talk) -> None:
        await talk.request()
        await talk.say(*said)
        if await talk.gone():
            gone.set()

    async with talking(script) as (hostile, upstream):
        heard = Heard()
        question = ask(upstream, heard)
        async with asyncio.timeout(SOON_S):
            while len(heard.told) < len(said) or not hostile.seen:
                await asyncio.sleep(0.01)
            told = list(heard.told)
            question.close()
            await gone.wait()
        assert heard.told == told
        assert "open=0" in repr(upstream)


def finishing(upstream: Upstream) -> tuple[Heard, Question]:
    """A listener that has seen enough with the first bytes of a body; it had paused, too."""

    def on(what: str) -> None:
        if what == "data":
            question.pause()
            question.finish()

    heard = Heard(on)
    question = ask(upstream, heard)
    return heard, question


async def test_finishing_keeps_the_connection_while_its_end_comes() -> None:
    """Who has seen enough leaves; the rest is awaited for the connection's sake, unheard."""

    async def late(talk: Talk) -> None:
        while True:
            await talk.request()
            await talk.say(SSE_HEAD, chunked(b"end"))
            await asyncio.sleep(0.05)
            await talk.say(chunked(b"\n"), b"0\r\n\r\n")

    async with talking(late) as (hostile, upstream):
        for _ in range(2):
            heard, question = finishing(upstream)
            async with asyncio.timeout(SOON_S):
                await heard.begun.wait()
            question.close()  # it has left: nothing is cut any more
            assert "idle=0" in repr(upstream)
            await asyncio.sleep(0.1)
            assert heard.told == ["head 200", "data"]
            assert "open=1 idle=1" in repr(upstream)
        assert hostile.connections == 1


async def test_what_lingers_is_bounded() -> None:
    """A body that does not end, says much more than its end or breaks off: the connection goes."""
    for rest in ([], [chunked(b"x" * 16_384)] * 8, [b"no chunk"]):
        async with talking(saying(SSE_HEAD, chunked(b"end"), *rest)) as (_, upstream):
            heard, _ = finishing(upstream)
            async with asyncio.timeout(4):  # the upstream itself waits for five seconds
                await heard.begun.wait()
                while "open=0" not in repr(upstream):
                    await asyncio.sleep(0.01)
            assert heard.told == ["head 200", "data"]


async def test_closing_tells_all_who_listen() -> None:
    """Dials and answers under way end with an error, told once; nothing new begins."""
    async with talking(saying(SSE_HEAD, chunked(b"a"))) as (_, upstream):
        again = Heard()
        streams = [Heard() for _ in range(3)]
        for each in streams:
            ask(upstream, each)
        async with asyncio.timeout(SOON_S):
            for each in streams:
                await each.begun.wait()
        dial = Heard(on=lambda _: void(ask(upstream, again)))
        ask(upstream, dial)
        await upstream.aclose()
        for each in [*streams, dial]:
            assert (await ended(each))[-1] == "failed"
            assert isinstance(each.error, EngineUnreachable)
        assert dial.told == again.told == ["failed"]
        assert repr(upstream).endswith("open=0 idle=0 dialling=0>")


def void(_: object) -> None:
    """A call that returns nothing."""


@pytest.mark.parametrize("said", [[], [SSE_HEAD], [SSE_HEAD, chunked(b"a")], [b"HTTP/1.1 200"]])
async def test_silence_is_told(said: list[bytes]) -> None:
    """Whenever an upstream goes silent, its listener is told after the bound."""
    async with talking(saying(*said), bounds=Bounds(silence_s=0.1)) as (_, upstream):
        heard = Heard()
        ask(upstream, heard)
        assert (await ended(heard))[-1] == "failed"
        assert isinstance(heard.error, EngineStalled)


async def test_a_slow_listener_is_no_silence() -> None:
    """While it pauses nothing is expected; from when it goes on, the bound counts anew."""
    now = asyncio.get_running_loop().time
    times: list[float] = []
    async with talking(saying(SSE_HEAD, chunked(b"a")), bounds=Bounds(silence_s=0.2)) as (_, up):
        heard = Heard(on=lambda _: times.append(now()))
        question = ask(up, heard)
        async with asyncio.timeout(SOON_S):
            await heard.begun.wait()
        question.pause()
        question.pause()
        await asyncio.sleep(0.5)
        assert heard.told == ["head 200", "data"]
        resumed = now()
        question.resume()
        question.resume()
        assert (await ended(heard))[-1] == "failed"
        assert isinstance(heard.error, EngineStalled)
        assert times[-1] - resumed >= 0.19  # never early; how late it is, is the machine's load


async def test_an_idle_connection_is_not_silent() -> None:
    """The watch over one answer's silence harms neither the pause after it nor the next."""

    async def slow(talk: Talk) -> None:
        while True:
            await talk.request()
            await asyncio.sleep(0.15)
            await talk.say(answer(b"1"))

    async with talking(slow, bounds=Bounds(silence_s=0.2)) as (hostile, upstream):
        for pause_s in (0.0, 0.1, 0.3, 0.05):
            await asyncio.sleep(pause_s)
            await ended_well(upstream)
        assert hostile.connections == 1


async def test_pausing_stops_the_upstream() -> None:
    """What is paused is not read from the socket; nothing is lost when it goes on."""
    sent = 0

    async def pouring(talk: Talk) -> None:
        nonlocal sent
        await talk.request()
        await talk.say(b"HTTP/1.1 200 OK\r\nContent-Length: 33554432\r\n\r\n")
        for _ in range(512):
            await talk.say(b"x" * 65_536)
            sent += 65_536

    async with talking(pouring) as (_, upstream):
        heard = Heard(on=lambda what: question.pause() if what == "data" and not going else None)
        going = False
        question = ask(upstream, heard)
        await asyncio.sleep(0.3)
        assert len(heard.body) < 1 << 20
        assert sent < 33_554_432
        going = True
        question.resume()
        assert (await ended(heard))[-1] == "complete"
        assert len(heard.body) == 33_554_432


def pausing(upstream: Upstream) -> Heard:
    """A listener that pauses whenever bytes of a body come."""
    heard = Heard(on=lambda what: question.pause() if what == "data" else None)
    question = ask(upstream, heard)
    return heard


async def test_pausing_with_the_last_bytes() -> None:
    """An answer that is whole ends in spite of a pause, which the next one inherits nothing of."""
    async with talking(always) as (hostile, upstream):
        for _ in range(3):
            heard = pausing(upstream)
            assert (await ended(heard))[-1] == "complete"
        assert hostile.connections == 1


@pytest.mark.parametrize("when", ["head 200", "data", "complete"])
async def test_asking_anew_from_within_a_call(when: str) -> None:
    """Who leaves a whole answer, or has heard its end, may ask at once on the same connection."""

    async with talking(always) as (hostile, upstream):
        second = Heard()

        def on(what: str) -> None:
            if what == when:
                question.close()
                ask(upstream, second, "/second")

        first = Heard(on)
        question = ask(upstream, first, "/first")
        assert (await ended(second))[-1] == "complete"
        assert second.body == b"/second:"
        assert first.told[-1] == when
        assert hostile.connections == 1


@pytest.mark.parametrize("when", ["head 200", "data", "complete"])
async def test_asking_anew_when_more_has_come_than_the_answer(when: str) -> None:
    """A second answer in the packet of the first never becomes that of whoever asks next."""
    async with talking(saying(answer(b"1") + answer(b"forged"))) as (hostile, upstream):
        second = Heard()

        def on(what: str) -> None:
            if what == when:
                question.close()
                ask(upstream, second)

        question = ask(upstream, Heard(on))
        assert (await ended(second))[-1] == "complete"
        assert second.body == b"1"
        assert hostile.connections == 2


async def test_asking_anew_after_a_failure() -> None:
    """Whoever is told of a failure may ask again from within that call."""
    async with talking(saying(b"nonsense\r\n\r\n")) as (hostile, upstream):
        second = Heard()
        first = Heard(on=lambda _: void(ask(upstream, second)))
        ask(upstream, first)
        assert await ended(second) == ["failed"]
        assert isinstance(second.error, EngineBroken)
        assert first.told == ["failed"]
        assert hostile.connections == 2


async def test_what_is_sound_is_told_before_what_is_not() -> None:
    """The bytes before a fault come through, though they came in one packet with it."""
    async with talking(saying(SSE_HEAD + chunked(b"a") + chunked(b"b") + b"no")) as (_, upstream):
        heard = Heard()
        ask(upstream, heard)
        assert await ended(heard) == ["head 200", "data", "failed"]
        assert heard.body == b"ab"
        assert isinstance(heard.error, EngineBroken)


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 400 Bad\r\nContent-Length: 0\r\n\r\n"])
async def test_an_upstream_that_does_not_wait_to_be_asked(said: bytes) -> None:
    """One that hangs up or speaks as soon as it is dialled has an end that is told."""

    async def rude(talk: Talk) -> None:
        await talk.say(said)

    async with talking(rude) as (_, upstream):
        for _ in range(20):
            heard = Heard()
            ask(upstream, heard)
            assert (await ended(heard))[-1] in ("failed", "complete")


async def test_an_idle_connection_that_ends_is_forgotten() -> None:
    """An upstream that hangs up on an idle connection is dialled anew, at no one's cost."""

    async def once(talk: Talk) -> None:
        await talk.request()
        await talk.say(answer(b"1"))

    async with talking(once) as (hostile, upstream):
        for number in range(1, 4):
            await ended_well(upstream)
            async with asyncio.timeout(SOON_S):
                while "open=0" not in repr(upstream):
                    await asyncio.sleep(0.01)
            assert hostile.connections == number
        assert len(hostile.seen) == 3


async def test_a_listeners_own_failure_is_its_own() -> None:
    """It is no fault of the upstream's protocol: it reaches the loop, and ends the answer."""
    loop = asyncio.get_running_loop()
    seen: list[BaseException] = []

    def handler(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        seen.append(context["exception"])

    def on(what: str) -> None:
        if what == "data":
            raise LookupError(what)

    async with talking(saying(SSE_HEAD, chunked(b"a"))) as (_, upstream):
        loop.set_exception_handler(handler)
        heard = Heard(on)
        ask(upstream, heard)
        assert await ended(heard) == ["head 200", "data", "failed"]
        assert [type(error) for error in seen] == [LookupError]
        assert "open=0" in repr(upstream)
    loop.set_exception_handler(None)
