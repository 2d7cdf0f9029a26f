"""A listed provider: any engine that speaks the OpenAI API over HTTP, behind the Engine port.

Theory of operation. Each call is one POST to the node's own URL with the body that the gateway
made and the node's own key; nothing of the client's request reaches the engine but that body. What
comes back is an `Answer`, which tells its receiver of the chunks; `generate` is a queue behind it.
Leaving the stream closes the connection, which every engine takes as the order to stop.

Whose fault an error is: 400, 413, 422 and the like are the request's own (EngineRefused). A key
that is refused, a model or route that is gone, too many requests, redirects and every 5xx are the
node's condition, and another node may do better (EngineUnreachable, EngineBroken).

Invariants: the key appears in no message.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import msgspec

from anser.adapters.engine_answer import ERROR_BYTES_MAX, Answer, Chunks
from anser.adapters.engine_detect import inspect
from anser.adapters.engine_errors import broken_json, error_in, error_of, error_of_status
from anser.core.errors import EngineBroken, EngineDeclined, EngineError, InvalidField
from anser.core.fleet import EngineKind, EngineReport, Node, parse_endpoint
from anser.core.limits import ENGINE_JSON_BYTES_MAX
from anser.ports import Call, Receiver, Route, Starter
from anser.wire.upstream import Bounds, Origin, Response, Upstream

__all__ = ["HttpEngine", "read_key"]

_LIST_BYTES_MAX = 4 * 1024 * 1024
_KEY_BYTES_MAX = 4_096
_NO_LIST = {404, 405, 501}


class _Embeddings(msgspec.Struct):
    data: list[msgspec.Raw]


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


class HttpEngine(Starter):
    """The engine behind one node's URL. `key` is read from the node's key file unless given."""

    def __init__(self, node: Node, key: str | None = None, *, bounds: Bounds | None = None) -> None:
        self._endpoint = endpoint = parse_endpoint(node.url)
        origin = Origin(
            scheme=endpoint.scheme, host=endpoint.host, port=endpoint.port, pin=endpoint.pin
        )
        self._upstream = Upstream(origin, bounds=bounds)
        self._key = key
        self._key_file = None if key is not None or not node.key_file else Path(node.key_file)
        self._heads: dict[Route, tuple[str | None, bytes]] = {}
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

    def start(self, call: Call, receiver: Receiver) -> Answer:
        """Open one answer: see the port."""
        assert call.route is not Route.EMBEDDINGS, call.route
        try:
            self._learn_key()
        except InvalidField as error:
            answer = Answer(receiver, None)
            declined = EngineDeclined("The node's key cannot be read from its key file.")
            declined.__cause__ = error
            asyncio.get_running_loop().call_soon(answer.failed, declined)
            return answer
        answer = Answer(receiver, self._key)
        body = msgspec.json.encode(call.body)
        answer.question = self._upstream.ask(self._head(call.route), body, answer)
        return answer

    @asynccontextmanager
    async def generate(self, call: Call) -> AsyncGenerator[AsyncIterator[bytes]]:
        """Open one answer: see the port. Raises InvalidField for its key, too."""
        self._learn_key()
        with Chunks() as chunks:
            chunks.follow(self.start(call, chunks))
            yield chunks

    async def embed(self, call: Call) -> bytes:
        """The OpenAI embeddings answer as JSON. Raises as `generate` does."""
        self._learn_key()
        sending = self._upstream.send(
            "POST",
            self._endpoint.path(call.route.value),
            headers=[("content-type", "application/json"), *self._headers("application/json")],
            body=msgspec.json.encode(call.body),
        )
        with await sending as response:
            if response.status != 200:
                raise await self._error(response)
            data = await self._whole(response, ENGINE_JSON_BYTES_MAX)
        try:
            _EMBEDDINGS.decode(data)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise (error_in(data, self._key) or broken_json("embeddings")) from error
        return data

    async def aclose(self) -> None:
        """Cut all connections; idempotent."""
        await self._upstream.aclose()

    def _learn_key(self) -> None:
        """Read the key unless it is known. Raises InvalidField."""
        if self._key is None and self._key_file is not None:
            self._key = read_key(self._key_file)

    def _head(self, route: Route) -> bytes:
        """All of a stream's question but its body; it is put together once for a route and key."""
        known = self._heads.get(route)
        if known is not None and known[0] == self._key:
            return known[1]
        path = self._endpoint.path(route.value)
        headers = [("content-type", "application/json"), *self._headers("text/event-stream")]
        head = self._upstream.start_of("POST", path, headers)
        self._heads[route] = self._key, head
        return head

    async def _error(self, response: Response) -> EngineError:
        """What any status but 200 means; so much of its body is read as may tell."""
        try:
            data = await response.read(ERROR_BYTES_MAX)
        except EngineError:
            data = b""  # the status alone must do
        return error_of(response.status, response.header(b"retry-after"), data, self._key)

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
