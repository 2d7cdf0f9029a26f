"""The admin API, `/admin/v1`: members, keys, nodes, usage, receipts, state and settings.

It is served on the Unix socket in the data folder, where being able to open it is the right to use
it, and on the separate admin listener, where an operator's key is asked for.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.routing import Route

from anser import __version__
from anser.api.auth import Doorkeeper
from anser.api.context import Services
from anser.api.fairness import fairness_of
from anser.api.reply import Handler, json_route, operator_of, query_text, read
from anser.api.usage import node_object, pool, request_of, usage_since
from anser.api.why import why_of
from anser.config import shown, without_password
from anser.core.errors import InvalidField
from anser.core.fleet import Node, check_node
from anser.core.members import Key, Limits, Member, Scope
from anser.services.pool import NodeView, view_of

__all__ = [
    "PATHS",
    "KeyBody",
    "LimitsBody",
    "LimitsChange",
    "MemberBody",
    "MemberChange",
    "NodeBody",
    "Nothing",
    "routes",
]

_Count = Annotated[int, msgspec.Meta(ge=1, le=10**15)]
_Weight = Annotated[int, msgspec.Meta(ge=1, le=10**9)]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_Label = Annotated[str, msgspec.Meta(max_length=100)]
_Seconds = Annotated[float, msgspec.Meta(gt=0, le=100 * 365 * 86_400)]


class LimitsBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A member's own limits; null is none of its own."""

    in_flight_max: _Count | None = None
    queued_max: _Count | None = None
    tokens_per_minute: _Count | None = None
    tokens_per_day: _Count | None = None


class MemberBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A member to add; weight in thousandths."""

    id: _Name
    weight: _Weight = 1_000
    limits: LimitsBody = LimitsBody()


class LimitsChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The limits to change; null takes one away, and what is left out stays."""

    in_flight_max: _Count | UnsetType | None = UNSET
    queued_max: _Count | UnsetType | None = UNSET
    tokens_per_minute: _Count | UnsetType | None = UNSET
    tokens_per_day: _Count | UnsetType | None = UNSET


class MemberChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to change of a member; weight in thousandths."""

    id: _Name
    weight: _Weight | None = None
    limits: LimitsChange = LimitsChange()


class KeyBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key to make; without `expires_in_s` it opens until it is revoked."""

    member: _Name
    label: _Label = ""
    scope: Literal["use", "operate"] = "use"
    expires_in_s: _Seconds | None = None


class NodeBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A node to list; without `id` it is called after its URL."""

    url: Annotated[str, msgspec.Meta(min_length=1, max_length=2_048)]
    id: _Name | None = None
    model: _Name | None = None
    slots: _Count | None = None
    key_file: Annotated[str, msgspec.Meta(max_length=4_096)] | None = None
    jurisdiction: _Name | None = None
    member: _Name | None = None


class Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An empty object."""


class _Admin:
    """The handlers; each reads, calls one service, and says what came of it."""

    def __init__(self, services: Services, doorkeeper: Doorkeeper) -> None:
        self._services = services
        self._doorkeeper = doorkeeper

    async def list_members(self, _: Request) -> object:
        members = self._services.members.members()
        return {"members": [_member(member) for member in members]}

    async def add_member(self, request: Request) -> object:
        body = await read(request, MemberBody)
        limits = Limits(**msgspec.structs.asdict(body.limits))
        added = await self._services.members.add_member(
            body.id, weight=body.weight, member_limits=limits
        )
        return _member(added)

    async def set_member(self, request: Request) -> object:
        body = await read(request, MemberChange)
        named = msgspec.structs.asdict(body.limits).items()
        changes = {limit: most for limit, most in named if most is not UNSET}
        changed = await self._services.members.set_member(
            body.id, weight=body.weight, changes=changes
        )
        return _member(changed)

    async def list_keys(self, request: Request) -> object:
        keys = self._services.members.keys(query_text(request, "member"))
        return {"keys": [_key(key) for key in keys]}

    async def create_key(self, request: Request) -> object:
        body = await read(request, KeyBody)
        if not body.label.isprintable():
            raise InvalidField("A label is printable text.", param="label")
        text, key = await self._services.members.create_key(
            body.member, label=body.label, scope=Scope(body.scope), lifetime_s=body.expires_in_s
        )
        return {**_key(key), "key": text}

    async def revoke_key(self, request: Request) -> object:
        return _key(await self._services.members.revoke_key(request.path_params["key"]))

    async def list_nodes(self, _: Request) -> object:
        return {"nodes": list(self._nodes().values())}

    async def add_node(self, request: Request) -> object:
        body = await read(request, NodeBody)
        node = Node(
            id=body.id or "",
            url=body.url,
            model=body.model,
            slots=body.slots,
            key_file=body.key_file,
            jurisdiction=body.jurisdiction,
            member=body.member or "",
        )
        check_node(node)
        if node.member:
            self._services.members.check_owner(node.member)
        added = await self._services.fleet.add(node)
        return self._nodes()[added.node.id]

    async def drain_node(self, request: Request) -> object:
        await read(request, Nothing)
        node = str(request.path_params["node"])
        await self._services.fleet.drain(node)
        return self._nodes()[node]

    async def resume_node(self, request: Request) -> object:
        await read(request, Nothing)
        node = str(request.path_params["node"])
        await self._services.fleet.resume(node)
        return self._nodes()[node]

    async def remove_node(self, request: Request) -> object:
        node = str(request.path_params["node"])
        await self._services.fleet.remove(node)
        return {"id": node, "removed": True}

    async def usage(self, request: Request) -> object:
        return await usage_since(self._services, request, query_text(request, "member"))

    async def receipt(self, request: Request) -> object:
        return await self._services.ledger.export(request_of(request.path_params["request"]))

    async def fairness(self, request: Request) -> object:
        return fairness_of(self._services, operator_of(request, self._doorkeeper))

    async def why(self, request: Request) -> object:
        return why_of(self._services, request_of(request.path_params["request"]))

    async def state(self, _: Request) -> object:
        return {
            **pool(self._services),
            "version": __version__,
            "data_dir": str(self._services.config.data_dir),
            "listen": f"{self._services.config.server.host}:{self._services.config.server.port}",
            "members": len(self._services.members.members()),
            "engine": self._engine(),
        }

    async def mirrors(self, _: Request) -> object:
        hub = self._services.hub
        seen = await hub.survey(hub.resolve(self._services.config.engine.model))
        return {"mirrors": [{"name": name, "trouble": seen[name]} for name in seen]}

    async def config(self, _: Request) -> object:
        return shown(self._services.loaded)

    def _engine(self) -> dict[str, object] | None:
        """The model that runs in this process, and its file once it is there."""
        wanted = self._services.config.engine
        if not wanted.enabled:
            return None
        model = self._services.hub.resolve(wanted.model)
        file = self._services.hub.find(model)
        return {
            "model": model.id,
            "file": None if file is None else str(file),
            "size_bytes": model.file.size_bytes,
        }

    def _nodes(self) -> dict[str, dict[str, object]]:
        views = view_of(self._services.fleet, self._services.gateway).nodes
        return {view.status.node.id: _node(view) for view in views}


_Handler = Callable[[_Admin, Request], Awaitable[object]]
_TABLE: tuple[tuple[str, str, _Handler], ...] = (
    ("GET", "/admin/v1/members", _Admin.list_members),
    ("POST", "/admin/v1/members", _Admin.add_member),
    ("PATCH", "/admin/v1/members", _Admin.set_member),
    ("GET", "/admin/v1/keys", _Admin.list_keys),
    ("POST", "/admin/v1/keys", _Admin.create_key),
    ("DELETE", "/admin/v1/keys/{key}", _Admin.revoke_key),
    ("GET", "/admin/v1/nodes", _Admin.list_nodes),
    ("POST", "/admin/v1/nodes", _Admin.add_node),
    ("POST", "/admin/v1/nodes/{node}/drain", _Admin.drain_node),
    ("POST", "/admin/v1/nodes/{node}/resume", _Admin.resume_node),
    ("DELETE", "/admin/v1/nodes/{node}", _Admin.remove_node),
    ("GET", "/admin/v1/usage", _Admin.usage),
    ("GET", "/admin/v1/fairness", _Admin.fairness),
    ("GET", "/admin/v1/receipts/{request}", _Admin.receipt),
    ("GET", "/admin/v1/why/{request}", _Admin.why),
    ("GET", "/admin/v1/state", _Admin.state),
    ("GET", "/admin/v1/mirrors", _Admin.mirrors),
    ("GET", "/admin/v1/config", _Admin.config),
)
PATHS = tuple((method, path) for method, path, _ in _TABLE)
"""(method, path) of every address here."""


def routes(services: Services, doorkeeper: Doorkeeper) -> list[Route]:
    """The routes of this module, each for operators only."""
    admin = _Admin(services, doorkeeper)

    def guarded(handler: _Handler) -> Handler:
        async def handle(request: Request) -> object:
            operator_of(request, doorkeeper)
            return await handler(admin, request)

        return handle

    table: dict[str, dict[str, Handler]] = {}
    for method, path, handler in _TABLE:
        table.setdefault(path, {})[method] = guarded(handler)
    return [json_route(path, handlers) for path, handlers in table.items()]


def _node(view: NodeView) -> dict[str, object]:
    """A node as its operators see it."""
    node = view.status.node
    return node_object(view) | {
        "url": without_password(node.url),
        "model": node.model,
        "key_file": node.key_file,
        "member": node.member or None,
        "error": view.status.error,
    }


def _member(member: Member) -> dict[str, object]:
    return {
        "id": member.id,
        "weight": member.weight,
        "limits": asdict(member.limits),
        "created_at": member.created_at,
    }


def _key(key: Key) -> dict[str, object]:
    return {
        "id": key.id,
        "member": key.member,
        "label": key.label,
        "scope": key.scope.value,
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
    }
