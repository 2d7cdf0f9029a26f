"""The guard's turns under any splits, beside the way by ASGI: an application that counts bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from hypothesis import example, given
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send

from anser.wire.server import GuardedProtocol, GuardSettings, guarded
from anser.wire.turn import FastLane, Turn, Visit, lines_of
from tests.fed import Fed

TARGET = b"/count"
_TEXT = (b"content-type", b"text/plain")


def heading(size: int, key: str | None) -> tuple[int, list[tuple[bytes, bytes]]]:
    """The status and headers of an answer of so many bytes."""
    return (401 if key == "wrong" else 200), [_TEXT, (b"content-length", b"%d" % size)]


class Counting:
    """Answers with the length of the body: at once, later, in parts, or not at all."""

    targets = frozenset({TARGET})
    body_bytes_max = 1_000

    def __init__(self) -> None:
        self.held = 0
        self.visits: list[_Count] = []

    def meet(self, turn: Turn) -> Visit:
        visit = _Count(self, turn)
        self.visits.append(visit)
        if turn.header(b"x-key") == "wrong":
            visit.answer(b"")
        return visit


class _Count:
    """One request of Counting."""

    def __init__(self, lane: Counting, turn: Turn) -> None:
        self.lane, self.turn = lane, turn
        self.held = 0
        self.told: list[str] = []

    def grew(self) -> None:
        more = len(self.turn.body) - self.held
        self.held += more
        self.lane.held += more

    def ask(self) -> bool:
        body = bytes(self.turn.body)
        if body.startswith(b"decline"):
            self.end()
            return False
        loop = asyncio.get_running_loop()
        if body.startswith(b"later"):
            loop.call_soon(self.unless_over, lambda: self.answer(body))
        elif body.startswith(b"stream"):
            self.turn.open(lines_of([_TEXT]))
            loop.call_soon(self.unless_over, lambda: self.turn.write(b"streamed"))
            loop.call_soon(self.unless_over, self.close)
        else:
            self.answer(body)
        return True

    def unless_over(self, step: Callable[[], None]) -> None:
        if not self.turn.over:
            step()

    def answer(self, body: bytes) -> None:
        self.end()
        said = b"%d:%b" % (len(body), body[:8])
        status, headers = heading(len(said), self.turn.header(b"x-key"))
        self.turn.reply(status, lines_of(headers), said)

    def close(self) -> None:
        self.end()
        self.turn.close(b"last")

    def end(self) -> None:
        self.lane.held -= self.held
        self.held = 0

    def left(self) -> None:
        self.told.append("left")
        self.end()

    def pause(self) -> None:
        self.told.append("pause")

    def resume(self) -> None:
        self.told.append("resume")

    def stop(self) -> None:
        self.answer(b"stopped")


async def count(scope: Scope, receive: Receive, send: Send) -> None:
    """The same by ASGI."""
    keys = [value.decode() for name, value in scope["headers"] if name == b"x-key"]
    key = keys[0] if keys else None
    body, more = b"", key != "wrong"
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message["body"]
        more = message["more_body"]
    if body.startswith(b"stream") and scope["path"] == TARGET.decode():
        await send({"type": "http.response.start", "status": 200, "headers": [_TEXT]})
        await send({"type": "http.response.body", "body": b"streamed", "more_body": True})
        await send({"type": "http.response.body", "body": b"last"})
        return
    said = b"%d:%b" % (len(body), body[:8])
    status, headers = heading(len(said), key)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": said})


def kind(lane: FastLane | None) -> type[GuardedProtocol]:
    return guarded(GuardSettings(), lane)


async def answered(lane: Counting | None, parts: list[bytes]) -> bytes:
    """What comes back, with the loop idle after each part."""
    fed = Fed(kind(lane), count)
    for part in parts:
        fed.feed(part)
        await fed.settle()
    fed.leave()
    await fed.settle()
    if lane is not None:
        assert lane.held == 0
        assert all(visit.turn.over or visit.turn.asked for visit in lane.visits)
    return bytes(fed.transport.written)


def cut(data: bytes, at: list[int]) -> list[bytes]:
    """`data` in parts that end at these places."""
    ends = sorted({min(end, len(data)) for end in at} | {len(data)})
    return [data[a:b] for a, b in zip([0, *ends], ends, strict=False) if b > a]


def post(body: bytes, *lines: bytes, path: bytes = TARGET) -> bytes:
    head = [b"POST %b HTTP/1.1" % path, b"Host: a", b"Content-Length: %d" % len(body), *lines]
    return b"\r\n".join([*head, b"", b""]) + body


_BODIES = st.sampled_from(
    [b"at once", b"later", b"stream", b"decline this", b"x" * 1_001, b"later" + b"y" * 400, b""]
)
_LINES = st.sampled_from(
    [(), (b"X-Key: wrong",), (b"Connection: close",), (b"Expect: 100-continue",), (b"X-Key: a",)]
)
_REQUESTS = st.builds(
    lambda body, lines, path: post(body, *lines, path=path),
    _BODIES,
    _LINES,
    st.sampled_from([TARGET, TARGET, b"/other", b"/count?q"]),
)
_CHUNKED = b"POST /count HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
_ODD = st.sampled_from(
    [
        b"GET /count HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /count HTTP/1.0\r\nContent-Length: 3\r\n\r\nold",
        _CHUNKED + b"2\r\nab\r\n0\r\n\r\n",
        b"POST /count HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc",
        b"\r\n",
        b"nonsense\r\n\r\n",
        b"POST /count HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nshort",
    ]
)
_WHAT = st.lists(_REQUESTS | _ODD, min_size=1, max_size=4).map(b"".join)
_CHANGING = b"x-request-id: "


def same_but_identifiers(one: bytes, other: bytes) -> bool:
    """Refusals have an identifier of their own."""
    lines = zip(one.splitlines(), other.splitlines(), strict=True)
    return all(a == b or (a[:14] == b[:14] == _CHANGING) for a, b in lines)


@example(post(b"at once") * 3, [])
@example(post(b"stream") + post(b"later") + post(b"decline") + post(b"at once"), [200])
@given(_WHAT, st.lists(st.integers(1, 3_000), max_size=12))
def test_no_split_changes_an_answer(data: bytes, at: list[int]) -> None:
    """However requests are cut into reads, lane and ASGI answer them alike, byte for byte; what
    the lane has held it gives back.
    """

    async def run() -> None:
        parts = cut(data, at)
        fast = await answered(Counting(), parts)
        assert same_but_identifiers(fast, await answered(None, parts))
        assert same_but_identifiers(fast, await answered(Counting(), [data]))

    asyncio.run(run())


def test_every_split_of_two_requests() -> None:
    """The same for each single place at which two requests can be cut in two."""

    async def run() -> None:
        data = post(b"later on", b"X-Key: a") + post(b"stream", b"Connection: close")
        whole = await answered(None, [data])
        assert whole.endswith(b"0\r\n\r\n")
        for place in range(1, len(data)):
            assert await answered(Counting(), [data[:place], data[place:]]) == whole

    asyncio.run(run())


@given(st.integers(1, 400))
def test_leaving_at_any_byte(place: int) -> None:
    """A client may leave anywhere: nothing is written after it, nothing stays held."""

    async def run() -> None:
        lane = Counting()
        fed = Fed(kind(lane), count)
        fed.feed((post(b"later") + post(b"stream") + post(b"decline"))[:place])
        fed.leave()
        written = bytes(fed.transport.written)
        await fed.settle()
        assert bytes(fed.transport.written) == written
        assert lane.held == 0
        assert all(visit.turn.over or visit.turn.asked for visit in lane.visits)

    asyncio.run(run())
