"""What a request that is refused, or cut short, is told beside the error itself."""

from __future__ import annotations

from anser.api.auth import Header
from anser.api.context import Services
from anser.api.errors import Headers
from anser.api.why import why_headers
from anser.core.errors import AnserError, LimitReached, ShuttingDown
from anser.services.members import Principal

__all__ = ["goodbye", "refusal_headers"]


def refusal_headers(
    services: Services,
    error: AnserError,
    *,
    principal: Principal | None,
    request: str,
    header: Header,
) -> Headers:
    """What is left to a member who has reached a limit; else why, if the request asked for that.

    `principal` is None while it is not known who asks.
    """
    if not isinstance(error, LimitReached):
        return why_headers(services, request, header)
    if principal is None:
        return []
    left = services.members.limits_left(principal.member)
    return [(name.encode(), value.encode()) for name, value in left.items()]


def goodbye() -> ShuttingDown:
    """What ends an answer that the platform's own end cuts short."""
    return ShuttingDown("This platform stopped before the answer's end.")
