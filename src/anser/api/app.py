"""The platform's HTTP applications: what anybody may reach, and what its operators may.

Theory of operation. Both are plain ASGI callables. Addresses of the hot path are answered right
here, one Exchange for each request; everything else goes to a Starlette application. Requests for
one answer mostly do not come here at all, but to the application's `lane` (lane.py). Every answer
carries `x-request-id`, our own: receipts are kept under it, so a caller's is not taken over.

Invariants: no exception leaves a request; an error on any address but a page is OpenAI's envelope.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from anser.api import admin, metrics, page, usage
from anser.api.auth import Doorkeeper
from anser.api.context import Services
from anser.api.errors import body_of, echo, headers_of, status_of
from anser.api.exchange import Bodies, Exchange, HungUp
from anser.api.lane import InferenceLane
from anser.api.refusal import goodbye, refusal_headers
from anser.api.routes import Direct, find_direct
from anser.core.errors import AnserError, MethodNotAllowed, NotFound
from anser.services.bugs import bug

__all__ = ["admin_app", "public_app"]

_GOODBYE_S = 1.0


def public_app(services: Services) -> ASGIApp:
    """What is reached on the platform's own address."""
    doorkeeper = Doorkeeper(services.members, services.clock)
    routes = [
        *page.routes(services),
        *usage.routes(services, doorkeeper),
        *metrics.routes(services, public=True),
    ]
    return _App(services, doorkeeper, routes)


def admin_app(services: Services) -> ASGIApp:
    """All that and what operators do: for a socket or a listener of its own."""
    doorkeeper = Doorkeeper(services.members, services.clock)
    routes = [
        *page.routes(services),
        *usage.routes(services, doorkeeper),
        *metrics.routes(services, public=False),
        *admin.routes(services, doorkeeper),
    ]
    return _App(services, doorkeeper, routes)


class _App:
    """An ASGI application."""

    __slots__ = ("_bodies", "_doorkeeper", "_rest", "_services", "lane")

    def __init__(
        self, services: Services, doorkeeper: Doorkeeper, routes: Sequence[BaseRoute]
    ) -> None:
        self._services = services
        self._doorkeeper = doorkeeper
        self._bodies = Bodies()
        self.lane = InferenceLane(services, doorkeeper, self._bodies)
        handlers = {AnserError: _show_error, HTTPException: _show_http_error, Exception: _show_bug}
        self._rest = Starlette(routes=routes, exception_handlers=handlers)
        self._rest.router.redirect_slashes = False  # it would answer with the caller's own host

    def __repr__(self) -> str:
        return f"<_App {len(self._rest.routes)} routes, {self._doorkeeper!r}>"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._rest(scope, receive, send)
            return
        exchange = Exchange(self._services, self._bodies, scope, receive, send)
        route = find_direct(scope["path"])
        try:
            if "preflight" in scope:
                await exchange.empty(204, [])
            elif route is None:
                await exchange.delegate(self._rest)
            else:
                await self._answer(exchange, route)
        except HungUp:
            return
        except asyncio.CancelledError:  # nobody else cancels this task: the platform is closed
            await _say_goodbye(exchange)
        except Exception as error:  # noqa: BLE001 - one of the two outermost loops
            await exchange.fail(bug(error, request=exchange.id))
        finally:
            exchange.forget()

    async def _answer(self, exchange: Exchange, route: Direct) -> None:
        try:
            await self._dispatch(exchange, route)
        except AnserError as error:
            told = refusal_headers(
                self._services,
                error,
                principal=exchange.principal,
                request=exchange.id,
                header=exchange.header,
            )
            await exchange.fail(error, told)

    async def _dispatch(self, exchange: Exchange, route: Direct) -> None:
        method = exchange.scope["method"]
        allow = [(b"allow", ", ".join(route.methods).encode())]
        if method == "OPTIONS":
            await exchange.empty(204, allow)
        elif method not in route.methods:
            await exchange.fail(_not_allowed(method, route.methods), allow)
        elif route.show is not None:
            await route.show(exchange)
        elif route.ask is not None:
            exchange.principal = self._doorkeeper.admit(exchange.header, exchange.scope)
            await route.ask(exchange, exchange.principal)


async def _say_goodbye(exchange: Exchange) -> None:
    """End an answer that the platform's own end cuts short; whoever does not read is not told."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_GOODBYE_S):
            await exchange.fail(goodbye())


async def _show_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, AnserError)
    headers = {name.decode(): value.decode() for name, value in headers_of(error)}
    return Response(body_of(error), status_of(error), headers, "application/json")


async def _show_http_error(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses, as a page for browsers and an envelope for all others."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404 and page.wants_page(request.url.path, request.headers):
        return page.not_found(request)
    known: AnserError = NotFound(f"There is nothing at {echo(request.url.path)}.")
    if error.status_code == 405:
        known = _not_allowed(request.method, ())
    response = await _show_error(request, known)
    response.status_code = error.status_code
    response.headers.update(error.headers or {})
    return response


async def _show_bug(request: Request, _: Exception) -> Response:
    return await _show_error(request, AnserError("The platform failed; its log tells more."))


def _not_allowed(method: str, methods: tuple[str, ...]) -> MethodNotAllowed:
    allowed = f" It answers to {', '.join(methods)}." if methods else ""
    return MethodNotAllowed(f"{echo(method)} is not answered here.{allowed}")
