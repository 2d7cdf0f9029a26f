"""wire.turn and its guard: what a lane is told, and what it may write, one connection at a time."""

from __future__ import annotations

import asyncio

import pytest
from starlette.types import Receive, Scope, Send

from anser.wire.server import GuardSettings, guarded
from anser.wire.turn import Turn, lane_of, lines_of
from tests.fed import Fed

pytestmark = pytest.mark.anyio

TEXT = lines_of([(b"content-type", b"text/plain")])
LENGTH = b"content-length: %d\r\n"


class Quiet:
    """A lane whose visits answer when the test says so; it notes what they are told."""

    targets = frozenset({b"/q"})
    body_bytes_max = 100

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.told: list[str] = []

    def meet(self, turn: Turn) -> Quiet:
        self.turns.append(turn)
        return self

    def grew(self) -> None:
        self.told.append("grew")

    def ask(self) -> bool:
        self.told.append("ask")
        return True

    def left(self) -> None:
        self.told.append("left")

    def pause(self) -> None:
        self.told.append("pause")

    def resume(self) -> None:
        self.told.append("resume")

    def stop(self) -> None:
        self.told.append("stop")
        self.reply(b"stopped")

    def reply(self, body: bytes) -> None:
        """Answer the newest turn."""
        self.turns[-1].reply(200, LENGTH % len(body), body)


def post(body: bytes = b"x", *lines: bytes, path: bytes = b"/q") -> bytes:
    head = [b"POST %b HTTP/1.1" % path, b"Host: a", b"Content-Length: %d" % len(body), *lines]
    return b"\r\n".join([*head, b"", b""]) + body


async def nobody(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that is not to be asked."""
    assert (receive, send) == (), scope


def fed(lane: Quiet, *, settings: GuardSettings | None = None) -> Fed:
    return Fed(guarded(settings or GuardSettings(), lane), nobody)


def answers(one: Fed) -> int:
    return bytes(one.transport.written).count(b"HTTP/1.1 ")


async def test_an_answer_is_one_write() -> None:
    """Head and body go out together, and so do a stream's last part and its end."""
    lane = Quiet()
    one = fed(lane)
    one.feed(post())
    lane.reply(b"hello")
    assert one.transport.writes == 1
    one.feed(post())
    turn = lane.turns[-1]
    turn.open(TEXT)
    turn.write(b"a")
    turn.close(b"bc", b"d")
    assert one.transport.writes == 4
    assert one.transport.written.endswith(b"\r\n\r\n1\r\na\r\n2\r\nbc\r\n1\r\nd\r\n0\r\n\r\n")
    assert repr(turn) == "<Turn /q over body=1>"
    assert "waiting" in repr(one.protocol)


async def test_nothing_follows_an_answer() -> None:
    """A turn is answered once, and not after its client has left."""
    lane = Quiet()
    one = fed(lane)
    one.feed(post())
    lane.reply(b"hello")
    for again in (lambda: lane.reply(b"more"), lambda: lane.turns[-1].close(b"x")):
        with pytest.raises(AssertionError):
            again()
    one.feed(post())
    one.leave()
    assert lane.told[-1] == "left"
    with pytest.raises(AssertionError):
        lane.reply(b"nobody hears")
    assert answers(one) == 1


@pytest.mark.parametrize("value", [b"a\r\nSet-Cookie: b", b"a\nb", b"a\x00", b"\x7f", b"a\r"])
async def test_a_header_cannot_hold_another(value: bytes) -> None:
    """No value ends its line."""
    with pytest.raises(ValueError, match="control"):
        lines_of([(b"x-node", value)])


async def test_what_the_client_does_is_told() -> None:
    """Not reading, reading again, leaving: in this order, and nothing to a turn that is over."""
    lane = Quiet()
    one = fed(lane)
    one.protocol.pause_writing()
    one.protocol.resume_writing()
    one.feed(post())
    one.protocol.pause_writing()
    one.protocol.resume_writing()
    one.leave()
    assert lane.told == ["grew", "ask", "pause", "resume", "left"]


async def test_who_does_not_read_is_not_served_further() -> None:
    """While the client does not read, its next request waits, and what it sends is bounded."""
    lane = Quiet()
    one = fed(lane)
    one.feed(post())
    lane.turns[-1].open(TEXT)
    one.protocol.pause_writing()
    lane.turns[-1].close(b"all")
    one.feed(post(), post(b"y" * 100) * 800)
    await one.settle()
    assert len(lane.turns) == 1
    assert not one.transport.reading
    one.protocol.resume_writing()
    assert len(lane.turns) == 2
    assert one.transport.reading is False  # it has sent more than is held for one
    for _ in range(801):
        lane.reply(b"n")
        await one.settle()
    assert len(lane.turns) == 802
    assert one.transport.reading


async def test_a_turn_sees_the_first_of_each_header() -> None:
    """As an ASGI application does that looks for the first of a name; names are in lower case."""
    lane = Quiet()
    fed(lane).feed(post(b"x", b"X-A: 1", b"x-a: 2", b"X-B: \xe9"))
    turn = lane.turns[0]
    assert (turn.header(b"x-a"), turn.header(b"x-b"), turn.header(b"x-c")) == ("1", "é", None)
    assert turn.origin == {"client": ("127.0.0.1", 5), "server": ("127.0.0.1", 80)}


async def test_the_servers_end_waits_for_an_answer() -> None:
    """On shutdown the present turn is answered, told to close, and the connection closed; one
    without a turn is closed at once.
    """
    lane = Quiet()
    one, idle = fed(lane), fed(Quiet())
    one.feed(post())
    one.protocol.shutdown()
    idle.protocol.shutdown()
    assert (one.transport.closed, idle.transport.closed) == (False, True)
    lane.reply(b"hello")
    assert one.transport.closed
    assert b"connection: close\r\n" in one.transport.written


async def test_the_servers_quick_end_is_told() -> None:
    """Who is being answered, or still sends its body, is told; there is nobody else to tell."""
    lane = Quiet()
    one = fed(lane)
    assert not one.protocol.cut_short()
    one.feed(post(b"xy")[:-1])
    one.protocol.shutdown()
    assert one.protocol.cut_short()
    assert lane.told == ["grew", "stop"]
    assert one.transport.written.endswith(b"stopped")
    assert one.transport.closed
    assert not one.protocol.cut_short()


@pytest.mark.parametrize("started", [False, True])
async def test_a_body_that_does_not_come(started: bool) -> None:
    """It is refused after its time, and the lane told; where an answer had begun it is cut off."""
    lane = Quiet()
    one = fed(lane, settings=GuardSettings(body_timeout_s=0.02))
    one.feed(post(b"xy")[:-1])
    if started:
        lane.turns[0].open(TEXT)
    await asyncio.sleep(0.1)
    assert lane.told == ["grew", "left"]
    assert one.transport.closed
    assert (b"HTTP/1.1 408 " in one.transport.written) is not started


async def test_an_answer_before_its_body() -> None:
    """What still comes of a body that its answer did not wait for is passed over."""
    lane = Quiet()
    one = fed(lane)
    head = post(b"x" * 50)
    one.feed(head[:-40])
    lane.reply(b"early")
    one.feed(head[-40:-20], head[-20:] + post(b"z"))
    assert lane.told == ["grew", "grew", "ask"]
    assert lane.turns[-1].body == b"z"
    lane.reply(b"next")
    assert answers(one) == 2


async def test_listening_for_a_client_that_sent_much_ahead() -> None:
    """Reading, paused for what was sent ahead, goes on when a visit wants to know of its client."""
    lane = Quiet()
    one = fed(lane)
    one.feed(post() + b"x" * 100_000)
    assert not one.transport.reading
    lane.turns[0].listen()
    assert one.transport.reading


async def test_an_application_may_have_no_lane() -> None:
    """Then nothing changes."""
    assert lane_of(nobody) is None
    taken: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        taken.append(scope["path"])
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    one = Fed(guarded(GuardSettings(), None), app)
    one.feed(post())
    await one.settle()
    assert taken == ["/q"]
