"""Errors as clients see them: OpenAI's envelope, a status, and headers that say what to do next.

Whatever the message quotes from a caller is cut and made printable here, at the last moment, so
that no text of theirs can forge a log line or drive a terminal.
"""

from __future__ import annotations

import math

import msgspec

from anser.core.errors import (
    AnserError,
    ConfigError,
    Conflict,
    EngineError,
    EngineRefused,
    LimitReached,
    StoreCorrupt,
    StoreNewer,
)
from anser.core.limits import ECHO_CHARS_MAX

__all__ = ["Headers", "body_of", "echo", "headers_of", "status_of"]

Headers = list[tuple[bytes, bytes]]
"""Header lines as ASGI sends them."""

_MESSAGE_CHARS_MAX = 2_000
_RETRY_AFTER_S = 5.0  # where nobody knows better
_PATIENCE_S = 120.0  # openai-python sleeps no longer than this between two tries
_FUTILE = (ConfigError, Conflict, EngineRefused, StoreCorrupt, StoreNewer)


def echo(text: str) -> str:
    """A caller's text for a message: quoted, printable, at most ECHO_CHARS_MAX characters.

    >>> echo("a\\x1b[31m")
    "'a\\\\x1b[31m'"
    """
    cut = text[:ECHO_CHARS_MAX]
    return f"'{_printable(cut)[:ECHO_CHARS_MAX]}{'…' if len(cut) < len(text) else ''}'"


def status_of(error: AnserError) -> int:
    """The HTTP status; what an engine chose itself is kept only where it is a client's error."""
    if isinstance(error, EngineRefused) and not 400 <= error.status < 500:
        return EngineError.status
    return error.status


def body_of(error: AnserError) -> bytes:
    """The envelope: {"error": {"message", "type", "param", "code"}}."""
    param = None if error.param is None else _printable(error.param[:ECHO_CHARS_MAX])
    detail = {
        "message": _printable(error.message[:_MESSAGE_CHARS_MAX]),
        "type": error.kind,
        "param": param,
        "code": error.code,
    }
    return msgspec.json.encode({"error": detail})


def headers_of(error: AnserError) -> Headers:
    """`retry-after` in whole seconds, at least 1; `x-should-retry: false` where it is futile."""
    headers: Headers = []
    wait_s = error.retry_after_s
    if wait_s is None and (error.status == 503 or isinstance(error, LimitReached)):
        wait_s = _RETRY_AFTER_S
    if wait_s is not None:
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(wait_s))))
    if isinstance(error, _FUTILE) or (wait_s is not None and wait_s > _PATIENCE_S):
        headers.append((b"x-should-retry", b"false"))
    return headers


def _printable(text: str) -> str:
    """`text` with every character that is not printable written as an escape."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
