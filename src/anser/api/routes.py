"""Every address of the platform, and who answers on it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from anser.api import admin, metrics, usage
from anser.api.blobs import send_blob
from anser.api.embeddings import embed
from anser.api.exchange import Exchange
from anser.api.health import health, ready
from anser.api.models import list_models, show_model
from anser.api.openai import chat, completion
from anser.services.members import Principal

__all__ = ["ROUTES", "Direct", "find_direct"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Direct:
    """An address that is answered without a framework.

    `ask` is for members, who have shown a key (or may do without); `show` is for anybody.
    """

    method: str
    path: str
    ask: Callable[[Exchange, Principal], Awaitable[None]] | None = None
    show: Callable[[Exchange], Awaitable[None]] | None = None

    @property
    def methods(self) -> tuple[str, ...]:
        """What it answers to."""
        return ("GET", "HEAD", "OPTIONS") if self.method == "GET" else (self.method, "OPTIONS")


_DIRECT = (
    Direct(method="POST", path="/v1/chat/completions", ask=chat),
    Direct(method="POST", path="/v1/completions", ask=completion),
    Direct(method="POST", path="/v1/embeddings", ask=embed),
    Direct(method="GET", path="/v1/models", ask=list_models),
    Direct(method="GET", path="/v1/models/{model}", ask=show_model),
    Direct(method="GET", path="/v1/blobs/{sha256}", ask=send_blob),
    Direct(method="GET", path="/health", show=health),
    Direct(method="GET", path="/ready", show=ready),
)
_EXACT = {route.path: route for route in _DIRECT if "{" not in route.path}
_BELOW = {route.path.partition("{")[0]: route for route in _DIRECT if "{" in route.path}

ROUTES: tuple[tuple[str, str], ...] = (
    *((route.method, route.path) for route in _DIRECT),
    ("GET", "/"),
    ("GET", "/static/{digest}/{name}"),
    *usage.PATHS,
    *metrics.PATHS,
    *admin.PATHS,
)
"""(method, path) of every address; those of `admin` are on the operators' listeners only."""


def find_direct(path: str) -> Direct | None:
    """The address that answers on `path`; what follows a parameter belongs to it."""
    found = _EXACT.get(path)
    if found is not None:
        return found
    for prefix, route in _BELOW.items():
        if path.startswith(prefix) and len(path) > len(prefix):
            return route
    return None
