"""Pages of other sites that may ask here with a key of their own: CORS, by setting.

Theory of operation. What a browser wants to read is the same for each part of an answer, so it
is put in among the headers that uvicorn sends with every head: a chunk costs nothing, and errors,
streams and refusals have them too. Only a preflight needs an answer of its own; it is marked in
its scope, and the application answers it before it looks for a route.

Invariants: credentials are never allowed, since keys travel in headers that a page must write
itself; only the public door has origins, so nothing of this reaches the operators' addresses.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["Cors", "is_origin"]

Headers = list[tuple[bytes, bytes]]

_ORIGIN = re.compile(r"https?://([a-z0-9_-]+(\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")
_PREFLIGHT: Headers = [
    (b"access-control-allow-methods", b"GET, HEAD, POST"),
    (b"access-control-allow-headers", b"authorization, *"),  # * leaves it out: Fetch, 4.9
    (b"access-control-max-age", b"7200"),
]


def is_origin(text: str) -> bool:
    """Whether it can be configured: an origin as browsers spell it, or `*` for all."""
    return text == "*" or _ORIGIN.fullmatch(text) is not None


class Cors:
    """The origins whose pages may read answers."""

    __slots__ = ("_any", "_origins")

    def __init__(self, origins: Sequence[str] = ()) -> None:
        self._any = "*" in origins
        self._origins = frozenset(origin.encode() for origin in origins)

    def __bool__(self) -> bool:
        return bool(self._origins)

    def __repr__(self) -> str:
        return f"<Cors {len(self._origins)} origins, any={self._any}>"

    def headers(self, asked: Headers, *, preflight: bool) -> Headers:
        """What the answer to a request with these headers (names in lower case) carries."""
        origin = next((value for name, value in asked if name == b"origin"), b"")
        vary: Headers = [] if self._any else [(b"vary", b"origin")]
        if not self._any and origin not in self._origins:
            return vary
        allowed = b"*" if self._any else origin
        told = [(b"access-control-allow-origin", allowed), (b"access-control-expose-headers", b"*")]
        return [*told, *vary, *(_PREFLIGHT if preflight else [])]

    @staticmethod
    def is_preflight(method: str, asked: Headers) -> bool:
        """Whether a browser asks if a page may ask."""
        names = {name for name, _ in asked} if method == "OPTIONS" else set[bytes]()
        return b"origin" in names and b"access-control-request-method" in names
