"""An engine's bytes, from its connection to what a receiver is told of its answer."""

from __future__ import annotations

import asyncio
import json

from anser.adapters.engine_answer import Answer
from anser.core.errors import EngineError
from anser.core.limits import ENGINE_MESSAGE_CHARS_MAX
from anser.wire.connection import Bounds, Connection, Question, State
from tests.fuzz import cut

__all__ = ["KEY", "check"]

KEY = "sk-key"  # the node's, which no message may tell
_ACTS = ("", "", "", "pause", "resume", "both", "abort", "")


class _Wire(asyncio.Transport):
    """The upstream's end."""

    closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert bytes(data) == b"POST"

    def abort(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        """Called by the connection."""

    def resume_reading(self) -> None:
        """Called by the connection."""


class _Keeper:
    """Keeps one connection."""

    lost_count = 0

    def lost(self, _: Connection) -> None:
        self.lost_count += 1

    def idle(self, connection: Connection) -> None:
        assert connection.state is State.IDLE

    def again(self, _: Question) -> None:
        raise AssertionError("it has not been kept")

    def forget(self, _: Question) -> None:
        raise AssertionError("it was sent")


class _Receiver:
    """Notes what it is told, and does what `acts` say from within each call."""

    def __init__(self, acts: int) -> None:
        self.told: list[object] = []
        self.gone = False
        self.answer = Answer(self, KEY)
        self._acts = acts

    def chunk(self, data: bytes) -> None:
        assert isinstance(json.loads(data), dict)
        assert b"\n" not in data
        self._tell(data)

    def ended(self) -> None:
        self._tell("ended")

    def failed(self, error: EngineError) -> None:
        param = getattr(error, "param", None) or ""
        for text in (error.message, param):
            assert KEY not in text
            assert text.isprintable()
            assert len(text) <= ENGINE_MESSAGE_CHARS_MAX + 100
        self._tell((type(error), error.message, param))

    def _tell(self, what: object) -> None:
        assert not self.gone
        assert not self.told or isinstance(self.told[-1], bytes)
        self.told.append(what)
        self.act()

    def act(self) -> None:
        """The next act, until none is left."""
        act, self._acts = _ACTS[self._acts % 8], self._acts // 8
        if act in ("pause", "both"):
            self.answer.pause()
        if act in ("resume", "both"):
            self.answer.resume()
        if act == "abort" and not self.gone:
            self.gone = True
            self.answer.abort(lambda: None)


def check(data: bytes) -> None:
    """What is told is sound and has one end, whatever comes, however it is split, read or left."""
    acts = int.from_bytes(data[:3], "big")
    stream, parts = cut(data[2:])
    asyncio.run(_check(acts, stream, parts))


async def _check(acts: int, stream: bytes, parts: list[bytes]) -> None:
    whole = _told([stream], 0).told
    assert isinstance(whole[-1], str | tuple)
    split = _told(parts, acts)
    assert split.told == (whole[: len(split.told)] if split.gone else whole)


def _told(parts: list[bytes], acts: int) -> _Receiver:
    wire, keeper, receiver = _Wire(), _Keeper(), _Receiver(acts)
    connection = Connection(keeper, Bounds())
    connection.connection_made(wire)
    question = receiver.answer.question = Question(keeper, (b"POST",), receiver.answer)
    connection.ask(question)
    for part in parts:
        if not wire.closed:
            connection.data_received(part)
        receiver.act()
    connection.connection_lost(None)
    assert connection.state is State.CLOSED
    assert keeper.lost_count == 1
    receiver._acts = 0
    receiver.answer.resume()
    return receiver
