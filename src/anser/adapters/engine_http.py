"""A listed provider: any engine that speaks the OpenAI API over HTTP, behind the Engine port.

Theory of operation. Each call is one POST to the node's own URL with the body that the gateway
made and the node's own key; nothing of the client's request reaches the engine but that body. The
answer's events are checked, one JSON object each, and passed on as they came. An answer has ended
well when [DONE] came, or, because some engines leave it out, when both a finish reason and the
usage have been seen; anything else that stops is the node's failure. One chunk is changed: where
an engine reports the usage with the finish, it is told in a chunk of its own after it. Leaving the
stream closes the connection, which every engine takes as the order to stop.

Whose fault an error is: 400, 413, 422 and the like are the request's own (EngineRefused). A key
that is refused, a model or route that is gone, too many requests, redirects and every 5xx are the
node's condition, and another node may do better (EngineUnreachable, EngineBroken).

Invariants: the key appears in no message; at most one chunk's limit of bytes is held per stream.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import msgspec

from anser.adapters.engine_detect import inspect
from anser.adapters.engine_errors import broken_json, error_in, error_of, error_of_status
from anser.core.errors import EngineBroken, EngineError, InvalidField
from anser.core.fleet import EngineKind, EngineReport, Node, parse_endpoint
from anser.core.limits import ENGINE_JSON_BYTES_MAX
from anser.ports import Call, Route
from anser.wire.sse import SseDecoder
from anser.wire.upstream import Bounds, Origin, Response, Upstream

__all__ = ["HttpEngine", "read_key"]

_ERROR_BYTES_MAX = 64 * 1024
_LIST_BYTES_MAX = 4 * 1024 * 1024
_KEY_BYTES_MAX = 4_096
_NO_LIST = {404, 405, 501}


class _Choice(msgspec.Struct):
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: Any = None
    error: Any = None
    object: str | None = None


class _Embeddings(msgspec.Struct):
    data: list[msgspec.Raw]


_CHUNK = msgspec.json.Decoder(_Chunk)
_EMBEDDINGS = msgspec.json.Decoder(_Embeddings)


def read_key(path: Path) -> str:
    """The key in a file that only its owner can read. Raises InvalidField, naming the cure."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(_KEY_BYTES_MAX + 1)
    except OSError as error:
        message = f"The key file {path} cannot be read: {error.strerror}."
        raise InvalidField(message, param="key_file") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        message = f"The key file {path} can be read by others. Say: chmod 600 {path}"
        raise InvalidField(message, param="key_file")
    key = text.strip()
    if not (key.isascii() and 0 < len(key) <= _KEY_BYTES_MAX and all(33 <= c < 127 for c in key)):
        message = f"The key file {path} must hold one key, without spaces, and nothing else."
        raise InvalidField(message, param="key_file")
    return key.decode("ascii")


class HttpEngine:
    """The engine behind one node's URL. `key` is read from the node's key file unless given."""

    def __init__(self, node: Node, key: str | None = None, *, bounds: Bounds | None = None) -> None:
        self._endpoint = endpoint = parse_endpoint(node.url)
        origin = Origin(
            scheme=endpoint.scheme, host=endpoint.host, port=endpoint.port, pin=endpoint.pin
        )
        self._upstream = Upstream(origin, bounds=bounds)
        self._key = key
        self._key_file = None if key is not None or not node.key_file else Path(node.key_file)
        self._kind: EngineKind | None = None
        self._model = node.model

    def __repr__(self) -> str:
        kind = "unknown" if self._kind is None else self._kind.value
        return f"<HttpEngine {kind} {self._upstream!r}>"

    def validate(self) -> None:
        """Assert the invariants."""
        self._upstream.validate()

    async def inspect(self) -> EngineReport:
        """Ask what it serves. Raises EngineUnreachable, EngineBroken; InvalidField for its key.

        The key file is read anew each time, so that a key can be changed while the platform runs.
        """
        if self._key_file is not None:
            self._key = read_key(self._key_file)
        known, self._kind = self._kind, None
        report = await inspect(await self._list(), self._ask, known, named=self._model)
        if known is None and report.kind is EngineKind.OPENAI:
            report = replace(report, platform=_public_key(await self._ask("/v1/signing-key")))
        self._kind = report.kind
        return report

    def generate(self, call: Call) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Open one answer: see the port. Raises EngineUnreachable, EngineBroken, EngineRefused."""
        return _Answer(self, call)

    async def embed(self, call: Call) -> bytes:
        """The OpenAI embeddings answer as JSON. Raises as `generate` does."""
        with await self.post(call, accept="application/json") as response:
            data = await self._whole(response, ENGINE_JSON_BYTES_MAX)
        try:
            _EMBEDDINGS.decode(data)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise (error_in(data, self._key) or broken_json("embeddings")) from error
        return data

    async def aclose(self) -> None:
        """Cut all connections; idempotent."""
        await self._upstream.aclose()

    async def post(self, call: Call, *, accept: str) -> Response:
        """Ask; returns once a 200 has come. Raises what any other status means."""
        if self._key is None and self._key_file is not None:
            self._key = read_key(self._key_file)
        response = await self._upstream.send(
            "POST",
            self._endpoint.path(call.route.value),
            headers=[("content-type", "application/json"), *self._headers(accept)],
            body=msgspec.json.encode(call.body),
        )
        if response.status == 200:
            return response
        with response:
            raise await error_of(response, self._key, _ERROR_BYTES_MAX)

    @property
    def key(self) -> str | None:
        """The node's own key, to be kept out of messages."""
        return self._key

    def _headers(self, accept: str) -> list[tuple[str, str]]:
        headers = [("accept", accept)]
        if self._key is not None:
            headers.append(("authorization", f"Bearer {self._key}"))
        return headers

    async def _whole(self, response: Response, limit: int) -> bytes:
        if response.until_eof:
            raise EngineBroken("The engine does not say how long its answer is.")
        return await response.read(limit)

    async def _get(self, path: str) -> tuple[int, bytes]:
        headers = self._headers("application/json")
        with await self._upstream.send("GET", path, headers=headers) as response:
            return response.status, await self._whole(response, _LIST_BYTES_MAX)

    async def _list(self) -> object:
        """Its list of models, or None if it keeps none."""
        status, data = await self._get(self._endpoint.path("/v1/models"))
        if status in _NO_LIST:
            return None
        if status != 200:
            raise error_of_status(status, data, self._key, of_node=True)
        value = _json(data)
        if value is None:
            raise broken_json("a list of models")
        return value

    async def _ask(self, path: str) -> object:
        try:
            status, data = await self._get(f"{self._endpoint.prefix}{path}")
        except EngineError:
            return None  # it lists its models, so it lives: it just does not know the question
        if status != 200:
            return None
        value = _json(data)
        return data.decode(errors="replace") if value is None else value


def _public_key(told: object) -> str | None:
    """Of an Anser platform; other servers have no such route."""
    key = cast("dict[str, object]", told).get("public_key") if isinstance(told, dict) else None
    return key if isinstance(key, str) else None


def _json(data: bytes) -> object:
    try:
        return msgspec.json.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None


class _Answer(AbstractAsyncContextManager[AsyncIterator[bytes], None]):
    """One stream: its context, and the iterator over its chunks."""

    def __init__(self, engine: HttpEngine, call: Call) -> None:
        assert call.route is not Route.EMBEDDINGS, call.route
        self._engine = engine
        self._call = call
        self._response: Response | None = None
        self._decoder = SseDecoder()
        self._chunks: deque[bytes] = deque()
        self._error: EngineError | None = None
        self._finished = False  # a finish reason has been seen
        self._used = False  # the usage has been seen
        self._usage: bytes | None = None  # it came with the finish, and is told after it
        self._ended = False

    def __repr__(self) -> str:
        seen = f"finished={self._finished} used={self._used} ended={self._ended}"
        return f"<_Answer waiting={len(self._chunks)} {seen} {self._decoder!r}>"

    async def __aenter__(self) -> AsyncIterator[bytes]:
        response = await self._engine.post(self._call, accept="text/event-stream")
        kind = response.header(b"content-type").partition(b";")[0].strip().lower()
        if kind != b"text/event-stream":
            with response:
                raise await self._no_stream(response, kind)
        self._response = response
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._response is not None:
            self._response.close()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            await self._more()
        return self._chunks.popleft()

    async def _more(self) -> None:
        assert self._response is not None, "iterated outside its context"
        try:
            data = await anext(self._response, b"")
            payloads = self._decoder.feed(data) if data else self._decoder.close()
            for payload in payloads:
                self._take(payload)
            if not data and not self._ended:
                raise EngineBroken("The engine's stream ended before its answer did.")
        except EngineError as error:
            self._stop(error)

    def _stop(self, error: EngineError) -> None:
        """The stream is over; that is no failure if nothing of the answer is missing."""
        assert self._response is not None
        self._response.close()
        if self._finished and self._used:
            self._end()
        else:
            self._error = error

    def _end(self) -> None:
        self._ended = True
        if self._usage is not None:
            self._chunks.append(self._usage)

    def _take(self, payload: bytes) -> None:
        if self._ended:
            return  # whatever comes after its end is none of it
        if payload == b"[DONE]":
            assert self._response is not None
            self._response.finish()
            self._end()
            return
        chunk = _decode(payload)
        if chunk.error is not None or chunk.object == "error":
            raise error_in(payload, self._engine.key) or broken_json("an error")
        finishes = any(choice.finish_reason for choice in chunk.choices or ())
        self._finished = self._finished or finishes
        if chunk.usage is not None:
            self._used, self._usage = True, None
            if finishes:
                payload, self._usage = _apart(payload)
        self._chunks.append(payload.replace(b"\n", b" ") if b"\n" in payload else payload)

    async def _no_stream(self, response: Response, kind: bytes) -> EngineError:
        """What a 200 means that is no stream."""
        data = await response.read(_ERROR_BYTES_MAX) if kind == b"application/json" else b""
        said = error_in(data, self._engine.key)
        return said or EngineBroken("The engine answered with something that is not a stream.")


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
