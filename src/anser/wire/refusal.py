"""What a client is told that is refused before any application has seen its request."""

from __future__ import annotations

import secrets

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from anser.core.errors import AnserError
from anser.wire.turn import Headers, lines_of

__all__ = ["refusal_of"]


def refusal_of(error: AnserError, common: Headers) -> bytes:
    """The whole answer, in OpenAI's envelope; `common` are the headers that every answer has."""
    envelope = {
        "message": error.message,
        "type": error.kind,
        "param": error.param,
        "code": error.code,
    }
    body = msgspec.json.encode({"error": envelope})
    headers = [
        *common,
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"x-request-id", f"req_{secrets.token_hex(12)}".encode()),
        (b"connection", b"close"),
    ]
    return STATUS_LINE[error.status] + lines_of(headers) + b"\r\n" + body
