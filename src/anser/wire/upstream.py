"""A pooled HTTP/1.1 client for upstreams that are not trusted to behave.

Theory of operation. An `Upstream` holds the connections to one origin. `ask` takes an idle
connection and writes the request at once, without a task; the listener is told of the answer by
calls. Where no connection idles, a task dials first. `send` is the same for who would rather wait:
it returns once the head of the answer is there; the body is then iterated as it comes. `finish`
gives the connection back, `close` cuts it unless the answer was complete, so that an upstream sees
at once that nobody listens any more. A request that meets a kept-alive connection which the
upstream had already dropped is sent once more on a fresh one, but only if not one byte of an
answer had come.

What is not done, on purpose: no redirect is followed, no cookie kept, no protocol switched, no
compression asked for or undone, and proxy settings in the environment are not honoured, because
an upstream's address is the operator's own word. TLS is verified against the system's store (or
SSL_CERT_FILE), or against a pinned SHA-256 of the certificate alone.

Invariants: one request at a time per connection; heads, unread bytes and bytes that bring nothing
forward are bounded; every wait has a deadline; an answer with both a length and chunks, with two
lengths, of another HTTP version or with a status outside 200-599 is refused.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections import deque
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from hmac import compare_digest

from anser.core.errors import ConnectTimeout, EngineUnreachable
from anser.wire.connection import Bounds, Connection, Listener, Question, State
from anser.wire.response import Response

__all__ = ["Bounds", "Origin", "Response", "Upstream"]

_CLOSED = "The connections to this engine were closed."
_JOINED_BYTES_MAX = 64 * 1024  # a body up to this is copied behind its head, to be one write


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where an upstream listens. `pin` is the SHA-256 of the only certificate that is trusted."""

    scheme: str
    host: str
    port: int
    pin: bytes | None = None

    @property
    def authority(self) -> str:
        """As in a Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        usual = {"http": 80, "https": 443}[self.scheme]
        return host if self.port == usual else f"{host}:{self.port}"


class Upstream:
    """The connections to one origin. Safe to use from many tasks of one event loop."""

    def __init__(self, origin: Origin, *, bounds: Bounds | None = None) -> None:
        self.origin = origin
        self.bounds = bounds or Bounds()
        self._tls = _tls_context(origin) if origin.scheme == "https" else None
        self._idle: deque[Connection] = deque()
        self._open: set[Connection] = set()
        self._dials: dict[Question, asyncio.Task[None]] = {}
        self._closed = False

    def __repr__(self) -> str:
        counts = f"open={len(self._open)} idle={len(self._idle)} dialling={len(self._dials)}"
        return f"<Upstream {self.origin.scheme}://{self.origin.authority} {counts}>"

    def validate(self) -> None:
        """Assert the invariants."""
        assert len(self._open) + len(self._dials) <= self.bounds.connections_max, self
        assert len(self._idle) <= self.bounds.idle_max, self
        assert set(self._idle) <= self._open, self
        assert all(connection.state is State.IDLE for connection in self._idle), self

    async def send(
        self,
        method: str,
        path: str,
        *,
        headers: Iterable[tuple[str, str]] = (),
        body: bytes = b"",
    ) -> Response:
        """Ask, and wait for the head of the answer. Raises EngineUnreachable, EngineBroken,
        EngineStalled.
        """
        start = self.start_of(method, path, headers)
        response = Response(self.bounds.buffer_bytes)
        bodiless = not body and method == "GET"
        return await response.begun(self.ask(start, None if bodiless else body, response))

    def start_of(self, method: str, path: str, headers: Iterable[tuple[str, str]] = ()) -> bytes:
        """All of a request's head but the length of its body: worth keeping, to `ask` with it."""
        return _start(method, path, self.origin.authority, tuple(headers))

    def ask(self, start: bytes, body: bytes | None, listener: Listener) -> Question:
        """Send a request, or one without a body. `listener` hears nothing before this returns."""
        question = Question(self, _encode(start, body), listener)
        connection = self._take()
        if connection is None:
            self._dial(question)
        else:
            question.kept = True
            connection.ask(question)
        return question

    async def aclose(self) -> None:
        """Cut every connection; idempotent. Answers under way end with EngineUnreachable."""
        self._closed = True
        dials, self._dials = self._dials, {}
        for question, dial in dials.items():
            dial.cancel()
            question.failed(EngineUnreachable(_CLOSED))
        for connection in tuple(self._open):
            connection.fail(EngineUnreachable(_CLOSED))

    def _take(self) -> Connection | None:
        self._prune()
        while self._idle:
            connection = self._idle.pop()
            if connection.state is State.IDLE:
                return connection
        return None

    def _prune(self) -> None:
        oldest = asyncio.get_running_loop().time() - self.bounds.idle_s
        while self._idle and self._idle[0].since < oldest:
            self._idle.popleft().cut()

    def _dial(self, question: Question) -> None:
        """Send it on a fresh connection; what forbids one is told later, as all else is."""
        loop = asyncio.get_running_loop()
        if self._closed:
            loop.call_soon(question.failed, EngineUnreachable(_CLOSED))
        elif len(self._open) + len(self._dials) >= self.bounds.connections_max:
            message = f"{self.origin.authority} has as many connections as it may."
            loop.call_soon(question.failed, EngineUnreachable(message))
        else:
            self._dials[question] = loop.create_task(self._dialled(question))

    async def _dialled(self, question: Question) -> None:
        try:
            connection = await _translated(self._connect(), self.origin, self.bounds)
        except EngineUnreachable as error:
            self._dials.pop(question, None)
            question.failed(error)
            return
        del self._dials[question]
        if connection.state is State.IDLE:
            self._open.add(connection)
            connection.ask(question)
        else:
            message = "The engine closed the connection, or spoke before it was asked."
            question.failed(EngineUnreachable(message))

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        origin = self.origin
        connection = Connection(self, self.bounds)
        try:
            async with asyncio.timeout(self.bounds.connect_timeout_s):
                transport, _ = await loop.create_connection(
                    lambda: connection,
                    origin.host,
                    origin.port,
                    ssl=self._tls,
                    server_hostname=origin.host if self._tls is not None else None,
                )
        except BaseException:
            connection.cut()  # it may have been made in the very moment of giving up
            raise
        if origin.pin is not None and not _pinned(transport, origin.pin):
            connection.cut()
            message = f"The certificate of {origin.authority} is not the one that its URL pins."
            raise EngineUnreachable(message)
        return connection

    # Told by connections

    def lost(self, connection: Connection) -> None:
        """A connection is gone."""
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def idle(self, connection: Connection) -> None:
        """A connection may carry another request, if there is room to keep it."""
        self._prune()
        if self._closed or len(self._idle) >= self.bounds.idle_max:
            connection.cut()
        else:
            self._idle.append(connection)

    def again(self, question: Question) -> None:
        """The upstream had dropped the kept connection that this was sent on."""
        question.kept = False
        self._dial(question)

    def forget(self, question: Question) -> None:
        """Its listener has left while it was dialled."""
        dial = self._dials.pop(question, None)
        if dial is not None:
            dial.cancel()


def _encode(start: bytes, body: bytes | None) -> tuple[bytes, ...]:
    if body is None:
        return (start + b"\r\n",)
    if len(body) <= _JOINED_BYTES_MAX:
        return (b"%bcontent-length: %d\r\n\r\n%b" % (start, len(body), body),)
    return b"%bcontent-length: %d\r\n\r\n" % (start, len(body)), body


@lru_cache(maxsize=256)  # the same few requests are made again and again
def _start(method: str, path: str, authority: str, headers: tuple[tuple[str, str], ...]) -> bytes:
    """All of a head but the length of its body."""
    lines = [f"{method} {path} HTTP/1.1", f"host: {authority}", "accept-encoding: identity"]
    lines += [f"{name}: {value}" for name, value in headers]
    assert path.startswith("/"), path
    assert " " not in path, path
    assert all(line.isascii() and line.isprintable() for line in lines), "a header is unclean"
    return "".join(f"{line}\r\n" for line in lines).encode("ascii")


def _tls_context(origin: Origin) -> ssl.SSLContext:
    context = ssl.create_default_context()  # honours SSL_CERT_FILE and SSL_CERT_DIR
    if origin.pin is not None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # the pin is checked before a byte is sent
    return context


def _pinned(transport: asyncio.Transport, pin: bytes) -> bool:
    tls: ssl.SSLObject = transport.get_extra_info("ssl_object")
    certificate = tls.getpeercert(binary_form=True)
    return certificate is not None and compare_digest(sha256(certificate).digest(), pin)


async def _translated(dial: Awaitable[Connection], origin: Origin, bounds: Bounds) -> Connection:
    """Foreign errors of dialling, in the one error tree."""
    where = origin.authority
    try:
        return await dial
    except TimeoutError:
        message = f"{where} took no connection within {bounds.connect_timeout_s:g} s."
        raise ConnectTimeout(message) from None
    except ssl.SSLCertVerificationError as error:
        raise EngineUnreachable(
            f"The certificate of {where} is not trusted: {error.verify_message}. To trust this "
            "one alone, add #sha256= and the fingerprint that "
            "`openssl x509 -noout -fingerprint -sha256` prints for it on that machine to the "
            "node's URL; or name its authority in SSL_CERT_FILE."
        ) from error
    except ssl.SSLError as error:
        raise EngineUnreachable(f"{where} does not speak TLS: {error.reason}.") from error
    except (OSError, UnicodeError) as error:
        message = f"{where} cannot be reached: {_reason(error)}."
        raise EngineUnreachable(message) from error


def _reason(error: OSError | UnicodeError) -> str:
    """The system's own words; asyncio's hide them behind the call's arguments."""
    errno = getattr(error, "errno", None)
    return os.strerror(errno) if isinstance(errno, int) and errno > 0 else str(error)
