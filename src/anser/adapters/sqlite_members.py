"""Members, keys and nodes in SQLite: plain functions on a connection."""

from __future__ import annotations

import sqlite3

from anser.adapters.sqlite_connection import queries, transaction
from anser.core.fleet import Node
from anser.core.members import Key, Limits, Member, Scope

__all__ = [
    "forget_keys",
    "forget_node",
    "keys",
    "members",
    "nodes",
    "put_key",
    "put_member",
    "put_node",
]


def members(connection: sqlite3.Connection) -> list[Member]:
    """All members, parents before children."""
    rows = connection.execute(queries("members")["members"])
    return [
        Member(
            id=id_,
            weight=weight,
            limits=Limits(
                in_flight_max=in_flight_max,
                queued_max=queued_max,
                tokens_per_minute=tokens_per_minute,
                tokens_per_day=tokens_per_day,
            ),
            created_at=created_at,
        )
        for (
            id_,
            weight,
            in_flight_max,
            queued_max,
            tokens_per_minute,
            tokens_per_day,
            created_at,
        ) in rows
    ]


def put_member(connection: sqlite3.Connection, member: Member) -> None:
    """Insert or replace by `id`."""
    connection.execute(
        queries("members")["put_member"],
        {
            "id": member.id,
            "weight": member.weight,
            "in_flight_max": member.limits.in_flight_max,
            "queued_max": member.limits.queued_max,
            "tokens_per_minute": member.limits.tokens_per_minute,
            "tokens_per_day": member.limits.tokens_per_day,
            "created_at": member.created_at,
        },
    )


def keys(connection: sqlite3.Connection) -> list[Key]:
    """All keys, by id."""
    rows = connection.execute(queries("members")["keys"])
    return [
        Key(
            id=id_,
            hash=hash_,
            member=member,
            label=label,
            scope=Scope(scope),
            created_at=created_at,
            expires_at=expires_at,
            revoked_at=revoked_at,
        )
        for id_, hash_, member, label, scope, created_at, expires_at, revoked_at in rows
    ]


def put_key(connection: sqlite3.Connection, key: Key) -> None:
    """Insert or replace by `id`."""
    connection.execute(
        queries("members")["put_key"],
        {
            "id": key.id,
            "hash": key.hash,
            "member": key.member,
            "label": key.label,
            "scope": key.scope.value,
            "created_at": key.created_at,
            "expires_at": key.expires_at,
            "revoked_at": key.revoked_at,
        },
    )


def forget_keys(connection: sqlite3.Connection, ids: tuple[str, ...]) -> None:
    """Delete these keys, all or none; unknown ones are passed over."""
    with transaction(connection):
        connection.executemany(queries("members")["forget_key"], [(id_,) for id_ in ids])


def nodes(connection: sqlite3.Connection) -> list[Node]:
    """All nodes, by id."""
    rows = connection.execute(queries("nodes")["nodes"])
    return [
        Node(
            id=id_,
            url=url,
            model=model,
            slots=slots,
            key_file=key_file,
            jurisdiction=jurisdiction,
            draining=bool(draining),
            member=member,
        )
        for id_, url, model, slots, key_file, jurisdiction, draining, member in rows
    ]


def put_node(connection: sqlite3.Connection, node: Node) -> None:
    """Insert or replace by `id`."""
    connection.execute(
        queries("nodes")["put_node"],
        {
            "id": node.id,
            "url": node.url,
            "model": node.model,
            "slots": node.slots,
            "key_file": node.key_file,
            "jurisdiction": node.jurisdiction,
            "draining": int(node.draining),
            "member": node.member,
        },
    )


def forget_node(connection: sqlite3.Connection, node: str) -> None:
    """Delete; an unknown one is passed over."""
    connection.execute(queries("nodes")["forget_node"], (node,))
