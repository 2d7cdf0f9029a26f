"""Receipts and their batches in SQLite: plain functions on a connection.

A receipt is kept as its leaf, the very bytes that were hashed and signed, and is read back from
them. Receipts of one batch have consecutive numbers, the batch that of its first.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

import msgspec

from anser.adapters.sqlite_connection import corrupt, queries, transaction
from anser.core.contribution import CREDIT_SPAN_MS, Credit, credit_of
from anser.core.errors import Conflict, ReceiptError, StoreCorrupt
from anser.core.ledger import Receipt, receipt_from_json
from anser.ports import SignedBatch, StoredReceipt, UsageRow

__all__ = ["append", "credits", "find", "recent", "usage"]


def append(connection: sqlite3.Connection, batch: SignedBatch) -> None:
    """Store a whole batch or nothing; nothing changes if all its receipts are stored already.

    Raises Conflict if only some are, or if one is stored with another content.
    """
    assert 0 < len(batch.leaves) == len(batch.receipts)
    try:
        with transaction(connection):
            _insert(connection, batch)
    except _StoredBeforeError as stored:
        _refuse_unless_same(connection, batch, added=stored.added)


def find(connection: sqlite3.Connection, request: str) -> StoredReceipt | None:
    """The receipt of one request, with its batch."""
    sql = queries("receipts")
    row = connection.execute(sql["find"], (request,)).fetchone()
    if row is None:
        return None
    first, index, size, root, public_key, signature, signed_ms = row
    rows = connection.execute(sql["leaves"], {"batch": first, "size": size})
    leaves = tuple(leaf for (leaf,) in rows)
    if len(leaves) != size:
        raise _damaged(connection, f"batch {first} has {len(leaves)} of its {size} receipts")
    return StoredReceipt(
        index=index,
        batch=SignedBatch(
            leaves=leaves,
            receipts=tuple(_receipt(connection, leaf) for leaf in leaves),
            root=root,
            public_key=public_key,
            signature=signature,
            signed_ms=signed_ms,
        ),
    )


def usage(
    connection: sqlite3.Connection, *, since_ms: int, until_ms: int, member: str | None
) -> list[UsageRow]:
    """Sums over receipts ended in [since, until), of `member` and all below it, or of all."""
    span = {"since_ms": since_ms, "until_ms": until_ms}
    rows = connection.execute(queries("receipts")["usage"], span | _subtree(member))
    return [
        UsageRow(
            member=member,
            model=model,
            requests=requests,
            failed=failed,
            cancelled=cancelled,
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            completion_tokens=completion_tokens,
        )
        for (
            member,
            model,
            requests,
            failed,
            cancelled,
            prompt_tokens,
            cached_tokens,
            completion_tokens,
        ) in rows
    ]


def recent(connection: sqlite3.Connection, *, limit: int, member: str | None) -> list[Receipt]:
    """The newest receipts first, of `member` and all below it, or of all."""
    sql = queries("receipts")
    if member is None:
        rows = connection.execute(sql["recent"], {"limit": limit})
    else:
        rows = connection.execute(sql["recent_of"], {"limit": limit} | _subtree(member))
    return [_receipt(connection, leaf) for (leaf,) in rows]


def credits(connection: sqlite3.Connection, *, since_ms: int, until_ms: int) -> list[Credit]:
    """Sums of credit of receipts ended in [since, until), for each owner and some hours."""
    span = {"since_ms": since_ms, "until_ms": until_ms, "step_ms": CREDIT_SPAN_MS}
    rows = connection.execute(queries("receipts")["credits"], span)
    return [
        Credit(owner=owner, micro_credits=round(earned), at_ms=round(at_ms))
        for owner, earned, at_ms in rows
    ]


class _StoredBeforeError(Exception):
    """Only `added` of a batch's receipts were new: rolls the transaction back."""

    def __init__(self, *, added: int) -> None:
        super().__init__()
        self.added = added


def _insert(connection: sqlite3.Connection, batch: SignedBatch) -> None:
    sql = queries("receipts")
    size = len(batch.leaves)
    first: int = connection.execute(sql["next_id"]).fetchone()[0]
    connection.execute(
        sql["add_batch"],
        (first, size, batch.root, batch.public_key, batch.signature, batch.signed_ms),
    )
    pairs = enumerate(zip(batch.receipts, batch.leaves, strict=True), start=first)
    rows = (_row(receipt, leaf=leaf, batch=first, id_=id_) for id_, (receipt, leaf) in pairs)
    added = connection.executemany(sql["add_receipt"], rows).rowcount
    if added != size:
        raise _StoredBeforeError(added=added)


def _row(receipt: Receipt, *, leaf: bytes, batch: int, id_: int) -> tuple[object, ...]:
    usage = receipt.usage
    credit = credit_of(receipt)
    return (
        id_,
        batch,
        receipt.request,
        receipt.member,
        receipt.model,
        receipt.outcome.value,
        receipt.ended_ms,
        usage.prompt_tokens,
        usage.cached_tokens,
        usage.completion_tokens,
        leaf,
        None if credit is None else credit.owner,
        None if credit is None else credit.micro_credits,
    )


def _refuse_unless_same(connection: sqlite3.Connection, batch: SignedBatch, *, added: int) -> None:
    sql = queries("receipts")["leaf"]
    for receipt, leaf in zip(batch.receipts, batch.leaves, strict=True):
        row = connection.execute(sql, (receipt.request,)).fetchone()
        if row is not None and row[0] != leaf:
            raise Conflict(f"Another receipt of request {receipt.request} is stored.")
    if added:
        raise Conflict("Some receipts of the batch are stored already, others are not.")


def _subtree(member: str | None) -> dict[str, object]:
    """The bounds of a member's subtree; a blob sorts after every text."""
    if member is None:
        return {"member": None, "low": "", "high": b""}
    return {"member": member, "low": f"{member}/", "high": f"{member}0"}


def _receipt(connection: sqlite3.Connection, leaf: bytes) -> Receipt:
    try:
        return receipt_from_json(msgspec.json.decode(leaf))
    except (msgspec.DecodeError, ReceiptError) as error:
        raise _damaged(connection, f"a receipt cannot be read: {error}") from error


def _damaged(connection: sqlite3.Connection, what: str) -> StoreCorrupt:
    _, _, path = connection.execute("PRAGMA database_list").fetchone()
    return corrupt(Path(path), what)
