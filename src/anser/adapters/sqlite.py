"""The embedded store: members, nodes and receipts in one SQLite file.

Theory of operation. Two lanes (`sqlite_connection`): all writes go through one connection on one
thread, so no write ever waits for another; reads go through a second one, which sees the last
commit and holds up nobody (write-ahead log). A write is on the disk when its verb returns.

Invariants: while the store is open both lanes are; the reading connection cannot write; when it
was closed in order, no log is left beside the file.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from anser.adapters import sqlite_members, sqlite_receipts, sqlite_schema
from anser.adapters.sqlite_connection import Lane
from anser.core.contribution import Credit
from anser.core.fleet import Node
from anser.core.ledger import Receipt
from anser.core.members import Key, Member
from anser.ports import SignedBatch, StoredReceipt, UsageRow

__all__ = ["SqliteStore"]


class SqliteStore:
    """Fills MemberStore, NodeStore and ReceiptStore from one file."""

    def __init__(self, path: Path, *, writer: Lane, reader: Lane) -> None:
        self._path = path
        self._writer = writer
        self._reader = reader

    def __repr__(self) -> str:
        return f"<SqliteStore {self._path.name} {self._writer!r} {self._reader!r}>"

    def validate(self) -> None:
        """Assert the invariants."""
        self._writer.validate()
        self._reader.validate()

    @classmethod
    @asynccontextmanager
    async def open(cls, path: Path) -> AsyncGenerator[SqliteStore]:
        """Open or create the file, for this process's lifetime of the context.

        Raises StoreLocked, StoreFull, StoreCorrupt, StoreNewer or StoreError, each with its cure.
        """
        check = sqlite_schema.unclean(path)
        sqlite_schema.create_file(path)
        writer = Lane(path, name="writer", deadline=False)
        reader = Lane(path, name="reader", deadline=True)
        await writer.open(partial(sqlite_schema.prepare, path=path, check=check))
        try:
            await reader.open(_read_only)
            try:
                yield cls(path, writer=writer, reader=reader)
            finally:
                await reader.aclose()
        finally:
            await writer.aclose()  # the last to close writes the log back into the file

    async def members(self) -> list[Member]:
        """All members, parents before children."""
        return await self._reader.call(sqlite_members.members)

    async def put_member(self, member: Member) -> None:
        """Insert or replace by `id`."""
        await self._writer.call(partial(sqlite_members.put_member, member=member))

    async def keys(self) -> list[Key]:
        """All keys, also expired and revoked ones."""
        return await self._reader.call(sqlite_members.keys)

    async def put_key(self, key: Key) -> None:
        """Insert or replace by `id`."""
        await self._writer.call(partial(sqlite_members.put_key, key=key))

    async def forget_keys(self, ids: tuple[str, ...]) -> None:
        """Delete these keys, all or none; unknown ones are passed over."""
        await self._writer.call(partial(sqlite_members.forget_keys, ids=ids))

    async def nodes(self) -> list[Node]:
        """All nodes, by id."""
        return await self._reader.call(sqlite_members.nodes)

    async def put_node(self, node: Node) -> None:
        """Insert or replace by `id`."""
        await self._writer.call(partial(sqlite_members.put_node, node=node))

    async def forget_node(self, node: str) -> None:
        """Delete; an unknown one is passed over."""
        await self._writer.call(partial(sqlite_members.forget_node, node=node))

    async def append(self, batch: SignedBatch) -> None:
        """Store a whole batch or nothing; durable on return."""
        await self._writer.call(partial(sqlite_receipts.append, batch=batch))

    async def find(self, request: str) -> StoredReceipt | None:
        """The receipt of one request."""
        return await self._reader.call(partial(sqlite_receipts.find, request=request))

    async def usage(self, *, since_ms: int, until_ms: int, member: str | None) -> list[UsageRow]:
        """Sums over receipts ended in [since, until), of `member` and all below it, or of all."""
        return await self._reader.call(
            partial(sqlite_receipts.usage, since_ms=since_ms, until_ms=until_ms, member=member)
        )

    async def recent(self, *, limit: int, member: str | None) -> list[Receipt]:
        """The newest receipts first, of `member` and all below it, or of all."""
        return await self._reader.call(partial(sqlite_receipts.recent, limit=limit, member=member))

    async def credits(self, *, since_ms: int, until_ms: int) -> list[Credit]:
        """Sums of credit of receipts ended in [since, until), for each owner and some hours."""
        return await self._reader.call(
            partial(sqlite_receipts.credits, since_ms=since_ms, until_ms=until_ms)
        )


def _read_only(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA query_only = ON")
