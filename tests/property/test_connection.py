"""An upstream's connection under any bytes, in any packets."""

from __future__ import annotations

import asyncio
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from anser.core.errors import EngineError
from anser.wire.connection import Bounds, Connection, Head, Question, State

_SOUND = [  # with the status and the body that each tells of
    (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", 200, b"hi"),
    (b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n", 404, b""),
    (b"HTTP/1.1 204 None\r\n\r\n", 204, b""),
    (b"HTTP/1.1 304 Same\r\nContent-Length: 9\r\n\r\n", 304, b""),
    (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 1\r\n\r\nx", 200, b"x"),
    (b"HTTP/1.1 103 Soon\r\nA: b\r\n\r\nHTTP/1.1 500 X\r\nContent-Length: 1\r\n\r\ny", 500, b"y"),
    (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n",
        200,
        b"abc",
    ),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nTail: x\r\n\r\n", 200, b""),
]
_PIECES = st.sampled_from(
    [
        *[answer for answer, _, _ in _SOUND],
        b"HTTP/1.1 200 OK\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Content-Length: 5\r\n",
        b"Connection: close\r\n",
        b"\r\n",
        b"3\r\nabc\r\n",
        b"0\r\n\r\n",
        b"HTTP/1.1 101 Switch\r\nUpgrade: x\r\n\r\n",
        b"A: b\r\n c\r\n",
    ]
)
_BYTES = st.lists(_PIECES | st.binary(max_size=4), max_size=12).map(b"".join)
_CUTS = st.lists(st.integers(min_value=0, max_value=300), max_size=12)


class _Wire(asyncio.Transport):
    """The upstream's end: what it was asked, and whether it was hung up on."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """One request."""
        assert bytes(data) == b"GET\r\n"
        self.asked += 1

    def abort(self) -> None:
        """The connection is cut."""
        self.closed = True

    def is_closing(self) -> bool:
        """Whether it is cut."""
        return self.closed


class _Keeper:
    """Keeps nothing, and counts the turns."""

    def __init__(self) -> None:
        self.turns: list[str] = []

    def lost(self, _: Connection) -> None:
        self.turns.append("lost")

    def idle(self, _: Connection) -> None:
        self.turns.append("idle")

    def again(self, _: Question) -> None:
        self.turns.append("again")

    def forget(self, _: Question) -> None:
        self.turns.append("forget")


class _Heard:
    """A listener that checks the order of what it is told."""

    def __init__(self) -> None:
        self.status = 0
        self.body = b""
        self.end: str | type[EngineError] | None = None

    def head(self, head: Head) -> None:
        assert not self.status
        assert self.end is None
        self.status = head.status

    def data(self, data: bytes) -> None:
        assert data
        assert self.status
        assert self.end is None
        self.body += data

    def complete(self) -> None:
        assert self.status
        assert self.end is None
        self.end = "complete"

    def failed(self, error: EngineError) -> None:
        assert self.end is None
        self.end = type(error)


def _packets(data: bytes, cuts: list[int]) -> list[bytes]:
    points = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(points)]


def _open() -> tuple[Connection, _Wire, _Keeper]:
    wire, keeper = _Wire(), _Keeper()
    connection = Connection(keeper, Bounds())
    connection.connection_made(wire)
    return connection, wire, keeper


def _ask(connection: Connection, keeper: _Keeper) -> _Heard:
    heard = _Heard()
    connection.ask(Question(keeper, (b"GET\r\n",), heard))
    return heard


@given(answers=st.lists(st.sampled_from(_SOUND), min_size=1, max_size=8), cuts=_CUTS)
def test_a_connection_serves_one_answer_after_the_other(
    answers: list[tuple[bytes, int, bytes]], cuts: list[int]
) -> None:
    """However each is framed and split, every listener hears its own answer, whole."""

    async def run() -> None:
        connection, wire, keeper = _open()
        for data, status, body in answers:
            heard = _ask(connection, keeper)
            for packet in _packets(data, cuts):
                assert heard.end is None
                connection.data_received(packet)
            assert (heard.status, heard.body, heard.end) == (status, body, "complete")
            assert connection.state is State.IDLE
        assert wire.asked == len(answers)
        assert keeper.turns == ["idle"] * len(answers)
        connection.cut()

    asyncio.run(run())


@given(data=_BYTES, cuts=_CUTS, leave=st.sampled_from(["", "", "finish", "close"]))
def test_any_bytes_have_one_end(data: bytes, cuts: list[int], leave: str) -> None:
    """Whatever comes, and however it is split, the same is told, with one end if nobody leaves."""

    async def run(packets: list[bytes], leaves: int | None) -> _Heard:
        connection, wire, keeper = _open()
        heard = _Heard()
        question = Question(keeper, (b"GET\r\n",), heard)
        connection.ask(question)
        for number, packet in enumerate(packets):
            if number == leaves:
                question.finish() if leave == "finish" else question.close()
                heard.end = heard.end or "left"  # nothing may be told any more
            if not wire.closed:
                connection.data_received(packet)
        connection.connection_lost(None)
        assert connection.state is State.CLOSED
        assert keeper.turns.count("lost") == 1
        assert heard.end is not None
        return heard

    packets = _packets(data, cuts)
    split = asyncio.run(run(packets, len(packets) // 2 if leave else None))
    if not leave:
        whole = asyncio.run(run([data], None))
        assert (split.status, split.body) == (whole.status, whole.body)
        assert split.end == whole.end
