"""One answer of an engine that speaks the OpenAI API: its events, checked, as they come.

Theory of operation. The answer listens to its connection. Events are checked, one JSON object
each, and told to the receiver as they came. An answer has ended well when [DONE] came, or, because
some engines leave it out, when both a finish reason and the usage have been seen; anything else
that stops is the node's failure. One chunk is changed: where an engine reports the usage with the
finish, it is told in a chunk of its own after it. What is no stream is read up to a limit, for what
it says of the failure.

Chunks that a packet brings are queued, and told from the queue's front until the receiver pauses:
so it may pause, resume or abort from within any call. While it pauses, the next packet pauses the
connection.

Invariants: at most one chunk's limit of bytes and two packets are held; the end is told once, after
all chunks; after the end or an abort nothing is told; the key appears in no message.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import msgspec

from anser.adapters.engine_errors import broken_json, error_in, error_of
from anser.core.errors import AnserError, EngineBroken, EngineError
from anser.core.limits import ENGINE_BUFFER_BYTES
from anser.ports import Receiver, Stream
from anser.wire.connection import Head, Question
from anser.wire.sse import SseDecoder

__all__ = ["ERROR_BYTES_MAX", "Answer", "Chunks"]

ERROR_BYTES_MAX = 64 * 1024


class _Choice(msgspec.Struct, gc=False):
    finish_reason: str | None = None


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: Any = None
    error: Any = None
    object: str | None = None


_CHUNK = msgspec.json.Decoder(_Chunk)


class Answer:
    """One stream: listens to its connection, tells its receiver."""

    __slots__ = (
        "_body",
        "_decoder",
        "_error",
        "_finished",
        "_head",
        "_key",
        "_over",
        "_paused",
        "_receiver",
        "_telling",
        "_usage",
        "_used",
        "_waiting",
        "question",
    )

    def __init__(self, receiver: Receiver, key: str | None) -> None:
        self.question: Question | None = None  # None again once nothing more is wanted of it
        self._receiver: Receiver | None = receiver  # None once it has heard the end, or left
        self._key = key  # of the node, to be kept out of messages
        self._head: Head | None = None  # of what is no stream
        self._body = bytearray()  # of the same
        self._decoder = SseDecoder()
        self._waiting: deque[bytes] = deque()  # chunks that have not been told
        self._paused = False
        self._telling = False  # the receiver is in a call of `chunk`
        self._finished = False  # a finish reason has been seen
        self._used = False  # the usage has been seen
        self._usage: bytes | None = None  # it came with the finish, and is told after it
        self._over = False  # nothing more is wanted of the engine
        self._error: EngineError | None = None  # what it failed of

    def __repr__(self) -> str:
        seen = f"finished={self._finished} used={self._used} over={self._over}"
        return f"<Answer waiting={len(self._waiting)} {seen} {self._decoder!r}>"

    # For the receiver

    def pause(self) -> None:
        """Tell of no more chunks, and soon take none from the engine; idempotent."""
        self._paused = True

    def resume(self) -> None:
        """Go on; idempotent."""
        if self._paused:
            self._paused = False
            self._drain()
            if not self._paused and self.question is not None:
                self.question.resume()

    def abort(self, stopped: Callable[[], None]) -> None:
        """Hang up, which stops the engine; its receiver hears no more."""
        self._receiver = None
        self._over = True
        self._waiting.clear()
        self._leave()
        stopped()

    def hurry(self) -> None:
        """To hang up takes no time."""

    # Told by the connection

    def head(self, head: Head) -> None:
        """Is it a stream?"""
        kind = head.header(b"content-type").partition(b";")[0].strip().lower()
        if head.status == 200 and kind == b"text/event-stream":
            return
        self._head = head
        if head.status == 200 and kind != b"application/json":
            self._told_whole()
            self._drain()

    def data(self, data: bytes) -> None:
        """The next bytes, of the stream or of what there is instead."""
        if self._head is not None:
            self._body += data
            if len(self._body) > ERROR_BYTES_MAX:
                what = f"The engine's answer has more than {ERROR_BYTES_MAX} bytes."
                self._told_broken(EngineBroken(what))
        else:
            try:
                for payload in self._decoder.feed(data):
                    self._take(payload)
            except EngineError as error:
                self._stop(error)
            if self._paused and self.question is not None:
                self.question.pause()
        self._drain()

    def complete(self) -> None:
        """The body has come whole: so has the answer, or it never will."""
        if self._head is not None:
            self._told_whole()
        else:
            try:
                for payload in self._decoder.close():
                    self._take(payload)
                self._stop(EngineBroken("The engine's stream ended before its answer did."))
            except EngineError as error:
                self._stop(error)
        self._drain()

    def failed(self, error: EngineError) -> None:
        """There is no more to come, whatever came before."""
        if self._head is not None:
            self._told_broken(error)
        else:
            self._stop(error)
        self._drain()

    # What came

    def _take(self, payload: bytes) -> None:
        if self._over:
            return  # whatever comes after its end is none of it
        if payload == b"[DONE]":
            if self.question is not None:
                self.question.finish()
            self._end()
            return
        chunk = _decode(payload)
        if chunk.error is not None or chunk.object == "error":
            raise error_in(payload, self._key) or broken_json("an error")
        finishes = False
        for choice in chunk.choices or ():
            finishes = finishes or bool(choice.finish_reason)
        self._finished = self._finished or finishes
        if chunk.usage is not None:
            self._used, self._usage = True, None
            if finishes:
                payload, self._usage = _apart(payload)
        self._waiting.append(payload.replace(b"\n", b" ") if b"\n" in payload else payload)

    def _told_whole(self) -> None:
        """What is no stream has come whole, as far as it can tell anything."""
        assert self._head is not None
        data = bytes(self._body)
        if self._head.status == 200:
            what = "The engine answered with something that is not a stream."
            self._stop(error_in(data, self._key) or EngineBroken(what))
        else:
            retry_after = self._head.header(b"retry-after")
            self._stop(error_of(self._head.status, retry_after, data, self._key))

    def _told_broken(self, error: EngineError) -> None:
        """What is no stream has broken off, or is too long: an error's status alone must do."""
        assert self._head is not None
        self._body.clear()
        if self._head.status == 200:
            self._stop(error)
        else:
            self._told_whole()

    def _stop(self, error: EngineError) -> None:
        """The stream is over; that is no failure if nothing of the answer is missing."""
        if self._over:
            return
        if not (self._finished and self._used):
            self._error = error
        self._end()

    def _end(self) -> None:
        self._over = True
        self._leave()
        if self._usage is not None and self._error is None:
            self._waiting.append(self._usage)

    def _leave(self) -> None:
        question, self.question = self.question, None
        if question is not None:
            question.close()

    # What is told

    def _drain(self) -> None:
        """Tell what waits, until the receiver pauses or leaves; then the end, if it has come."""
        if self._telling or self._receiver is None:
            return
        receiver = self._receiver
        self._telling = True
        try:
            while self._waiting and not self._paused:
                receiver.chunk(self._waiting.popleft())
        finally:
            self._telling = False
        if self._over and not self._paused:
            self._tell_end()

    def _tell_end(self) -> None:
        receiver, self._receiver = self._receiver, None
        if receiver is None:
            return  # it has left from within its last call
        if self._error is None:
            receiver.ended()
        else:
            receiver.failed(self._error)


class Chunks:
    """A receiver whose chunks are awaited: pauses its stream while too much of it is unread.

    As a context manager it aborts what has not ended.
    """

    def __init__(self) -> None:
        self._stream: Stream | None = None
        self._chunks: deque[bytes] = deque()
        self._unread = 0
        self._ended = False
        self._error: AnserError | None = None
        self._news = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Chunks unread={self._unread} ended={self._ended}>"

    def follow(self, stream: Stream) -> None:
        """The stream that it is the receiver of."""
        self._stream = stream

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.abort(self.ended)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._news.clear()
            if self._stream is not None:
                self._stream.resume()
            await self._news.wait()
        data = self._chunks.popleft()
        self._unread -= len(data)
        return data

    def chunk(self, data: bytes) -> None:
        """The next chunk."""
        self._chunks.append(data)
        self._unread += len(data)
        self._news.set()
        if self._unread > ENGINE_BUFFER_BYTES and self._stream is not None:
            self._stream.pause()

    def ended(self) -> None:
        """All has come."""
        self._ended = True
        self._news.set()

    def failed(self, error: AnserError) -> None:
        """No more comes."""
        self._error = error
        self._news.set()


def _apart(payload: bytes) -> tuple[bytes, bytes]:
    """A chunk that has a finish and the usage, as the two chunks that OpenAI makes of them."""
    chunk = msgspec.json.decode(payload, type=dict[str, msgspec.Raw])
    usage = chunk.pop("usage")
    told = {**chunk, "choices": msgspec.Raw(b"[]"), "usage": usage}
    return msgspec.json.encode(chunk), msgspec.json.encode(told)


def _decode(payload: bytes) -> _Chunk:
    try:
        if not payload.isascii():
            payload.decode()
        return _CHUNK.decode(payload)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise broken_json("a chunk") from error
