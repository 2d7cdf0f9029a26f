"""`/health` and `/ready`: for balancers, and for clients that ask before they begin."""

from __future__ import annotations

import msgspec

from anser.api.exchange import Exchange
from anser.core.errors import NoNode, ShuttingDown
from anser.services.pool import nodes_ready

__all__ = ["health", "ready"]


async def health(exchange: Exchange) -> None:
    """GET /health: 200 as soon as the socket is open; `?ready=1` asks as /ready does."""
    if b"ready=1" in exchange.scope["query_string"].split(b"&"):
        await ready(exchange)
        return
    up, draining = _state(exchange)
    body = {"status": "ok", "ready": up > 0 and not draining, "nodes_up": up, "draining": draining}
    await exchange.reply(200, msgspec.json.encode(body))


async def ready(exchange: Exchange) -> None:
    """GET /ready: 200 while a node is up and serves a model. Raises NoNode, ShuttingDown."""
    up, draining = _state(exchange)
    if draining:
        raise ShuttingDown("This platform is stopping.")
    if not up:
        raise NoNode("No node serves yet.")
    await exchange.reply(200, msgspec.json.encode({"status": "ready", "nodes_up": up}))


def _state(exchange: Exchange) -> tuple[int, bool]:
    services = exchange.services
    return nodes_ready(services.fleet), services.gateway.draining
