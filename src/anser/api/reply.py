"""The quiet routes' way: a checked body in, JSON out, and who may ask.

Inference has its own, faster way (exchange.py). What is here serves the admin API, usage, receipts
and metrics, where a framework's convenience costs nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from anser.api.auth import Doorkeeper
from anser.api.decode import decode_object
from anser.core.errors import (
    BodyTimeout,
    BodyTooLarge,
    Forbidden,
    InvalidField,
    RequestError,
    Unauthenticated,
)
from anser.core.limits import BODY_TIMEOUT_S
from anser.core.members import Scope
from anser.services.members import Principal

__all__ = [
    "Handler",
    "json_route",
    "member_of",
    "operator_of",
    "query_number",
    "query_text",
    "read",
]

_BODY_BYTES_MAX = 64 * 1024
Handler = Callable[[Request], Awaitable[object]]
"""Answers one request with a value."""
_Body = TypeVar("_Body", bound=msgspec.Struct)


def json_route(path: str, handlers: Mapping[str, Handler]) -> Route:
    """A route with, by method, handlers that return what is sent as JSON or raise AnserError."""

    async def endpoint(request: Request) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        content = msgspec.json.encode(await handlers[method](request))
        headers = {"cache-control": "no-store"}
        return Response(content, 200, headers, "application/json")

    return Route(path, endpoint, methods=list(handlers))


async def read(request: Request, kind: type[_Body]) -> _Body:
    """The body as `kind`, strictly. Raises InvalidField, RequestError, BodyTooLarge."""
    fields = decode_object(await _content(request))
    try:
        return msgspec.convert(fields, kind, strict=True)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$.")
        raise InvalidField(f"{message}.", param=where.rstrip("`") or None) from None


def query_text(request: Request, name: str) -> str | None:
    """A parameter of the address. Raises InvalidField if it is given twice."""
    values = request.query_params.getlist(name)
    if len(values) > 1:
        raise InvalidField(f"{name} is given {len(values)} times.", param=name)
    return values[0] if values else None


def query_number(request: Request, name: str, *, default: float, high: float) -> float:
    """A number from 0 to `high` of the address. Raises InvalidField."""
    text = query_text(request, name)
    try:
        value = default if text is None else float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= high:  # true for NaN
        raise InvalidField(f"{name} must be a number from 0 to {high:.12g}.", param=name)
    return value


def member_of(request: Request, doorkeeper: Doorkeeper) -> Principal:
    """Who asks; on the platform's own socket, its owner. Raises Unauthenticated, Forbidden."""
    return doorkeeper.admit(lambda name: request.headers.get(name.decode()), request.scope)


def operator_of(request: Request, doorkeeper: Doorkeeper) -> Principal:
    """Who asks, if they may operate the platform. Raises Unauthenticated, Forbidden."""
    principal = member_of(request, doorkeeper)
    if principal.anonymous:
        raise Unauthenticated("This needs an operator's key: `anser key create ... --operator`.")
    if principal.scope is not Scope.OPERATE:
        message = "This key may not operate the platform: `anser key create ... --operator`."
        raise Forbidden(message)
    return principal


async def _content(request: Request) -> bytes:
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > _BODY_BYTES_MAX:
                    raise BodyTooLarge(f"A body has at most {_BODY_BYTES_MAX} bytes here.")
    except TimeoutError:
        raise BodyTimeout(f"The body did not arrive within {BODY_TIMEOUT_S:.0f} s.") from None
    except ClientDisconnect:
        raise RequestError("The client has left.") from None
    return b"".join(parts)
