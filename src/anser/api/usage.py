"""What anybody may know: the pool's state, one's own usage, receipts and waits, the signing key.

Another member's usage, receipts and waits are answered like what does not exist; only an operator's
key sees all. The pool's state names nodes and models, never a member.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.routing import Route

from anser.api.auth import Doorkeeper
from anser.api.context import Services
from anser.api.fairness import fairness_of
from anser.api.reply import json_route, member_of, query_number, query_text
from anser.api.why import why_of, why_unknown
from anser.core.errors import NotFound, Unauthenticated
from anser.core.members import Scope
from anser.ports import UsageRow
from anser.services.members import Principal
from anser.services.pool import ModelView, NodeView, view_of

__all__ = ["PATHS", "node_object", "pool", "request_of", "routes", "usage_since"]

PATHS = (
    ("GET", "/v1/usage"),
    ("GET", "/v1/receipts/{request}"),
    ("GET", "/v1/why/{request}"),
    ("GET", "/v1/fairness"),
    ("GET", "/v1/pool"),
    ("GET", "/v1/signing-key"),
)
"""(method, path) of every address here."""
_WEEK_S = 7 * 86_400.0
_LONGEST_S = 100 * 365 * 86_400.0
_REQUEST_CHARS_MAX = 128
_ANSWER_KINDS = ("chatcmpl", "cmpl")


def routes(services: Services, doorkeeper: Doorkeeper) -> list[Route]:
    """The routes of this module."""
    shown = _Shown(services, doorkeeper)
    handlers = (
        shown.usage,
        shown.receipt,
        shown.why,
        shown.fairness,
        shown.pool,
        shown.signing_key,
    )
    return [
        json_route(path, {method: handler})
        for (method, path), handler in zip(PATHS, handlers, strict=True)
    ]


def request_of(text: str) -> str:
    """A request's id, also from the `id` of its answer, which is made of it.

    >>> request_of("chatcmpl-1f2e"), request_of("req_1f2e")
    ('req_1f2e', 'req_1f2e')
    """
    kind, dash, rest = text.partition("-")
    return f"req_{rest}" if dash and kind in _ANSWER_KINDS else text


def pool(services: Services) -> dict[str, object]:
    """The live state: what waits, what runs where, and how fast."""
    view = view_of(services.fleet, services.gateway)
    return {
        "object": "pool",
        "queued": view.queued,
        "running": view.running,
        "slots": view.slots,
        "nodes_ready": view.nodes_ready,
        "tokens_per_s": round(view.tokens_per_s, 3),
        "draining": view.draining,
        "default_model": view.default,
        "nodes": [node_object(node) for node in view.nodes],
        "models": [_model(model) for model in view.models],
    }


def node_object(view: NodeView) -> dict[str, object]:
    """A node as anybody may see it."""
    status = view.status
    return {
        "id": status.node.id,
        "state": status.state.value,
        "engine": None if status.kind is None else status.kind.value,
        "version": status.version,
        "models": sorted({offer.model for offer in status.offers}),
        "slots": status.slots,
        "busy": view.busy,
        "jurisdiction": status.node.jurisdiction,
    }


async def usage_since(services: Services, request: Request, member: str | None) -> object:
    """The sums of the last `since_s` seconds, of `member` and all below it, or of all.

    Raises NotFound for a member that there is not: an empty answer would hide a slip.
    """
    if member is not None:
        services.members.check_known(member)
    since_s = query_number(request, "since_s", default=_WEEK_S, high=_LONGEST_S)
    until_ms = int(services.clock.wall() * 1_000) + 1
    since_ms = max(0, until_ms - int(since_s * 1_000))
    rows = await services.ledger.usage(since_ms=since_ms, until_ms=until_ms, member=member)
    return {
        "object": "usage",
        "since_ms": since_ms,
        "until_ms": until_ms,
        "usage": [_row(row) for row in rows],
    }


class _Shown:
    """The handlers."""

    def __init__(self, services: Services, doorkeeper: Doorkeeper) -> None:
        self._services = services
        self._doorkeeper = doorkeeper

    async def usage(self, request: Request) -> object:
        principal = member_of(request, self._doorkeeper)
        if principal.anonymous:
            raise Unauthenticated("Usage is shown to members: send a key.")
        member = query_text(request, "member")
        if principal.scope is not Scope.OPERATE and member is None:
            member = principal.member
        if member is not None and not _may_see(principal, member):
            raise NotFound("There is no such member among those that you may see.", param="member")
        return await usage_since(self._services, request, member)

    async def receipt(self, request: Request) -> object:
        principal = member_of(request, self._doorkeeper)
        missing = NotFound("There is no such receipt among those that you may see.")
        wanted = str(request.path_params["request"])
        if len(wanted) > _REQUEST_CHARS_MAX:
            raise missing
        try:
            document = await self._services.ledger.export(request_of(wanted))
        except NotFound:
            raise missing from None
        if not _may_see(principal, document["receipt"]["member"]):
            raise missing
        return document

    async def why(self, request: Request) -> object:
        principal = member_of(request, self._doorkeeper)
        found = why_of(self._services, request_of(str(request.path_params["request"])))
        if not _may_see(principal, found["member"]):
            raise why_unknown()
        return found

    async def fairness(self, request: Request) -> object:
        return fairness_of(self._services, member_of(request, self._doorkeeper))

    async def pool(self, request: Request) -> object:
        member_of(request, self._doorkeeper)
        return pool(self._services)

    async def signing_key(self, _: Request) -> object:
        public_key = self._services.ledger.public_key.hex()
        return {"object": "signing_key", "algorithm": "ed25519", "public_key": public_key}


def _may_see(principal: Principal, member: str) -> bool:
    """Whether usage and receipts of `member` are this principal's own, or it may see all."""
    own = member == principal.member or member.startswith(f"{principal.member}/")
    return own or principal.scope is Scope.OPERATE


def _model(view: ModelView) -> dict[str, object]:
    return {
        "id": view.id,
        "nodes": view.nodes,
        "nodes_ready": view.nodes_ready,
        "ready": view.ready,
        "context_length": view.context_tokens,
        "capabilities": view.ability.words,
    }


def _row(row: UsageRow) -> dict[str, object]:
    return {
        "member": row.member,
        "model": row.model,
        "requests": row.requests,
        "failed": row.failed,
        "cancelled": row.cancelled,
        "prompt_tokens": row.prompt_tokens,
        "cached_tokens": row.cached_tokens,
        "completion_tokens": row.completion_tokens,
    }
