"""How the embedded store behaves as a resource: its files, deadlines, limits and end."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from anser.adapters import sqlite_schema
from anser.adapters.signer import KeyFileSigner
from anser.adapters.sqlite import SqliteStore
from anser.core import limits
from anser.core.errors import StoreError
from anser.core.members import Member
from anser.ports import Signer
from tests.receipts import make_batch, make_receipt

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    """A real Ed25519 key."""
    return KeyFileSigner.open(tmp_path_factory.mktemp("key") / "signing.key")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the store's file is."""
    return tmp_path / "anser.db"


async def test_clean_end_leaves_one_private_file(path: Path, signer: Signer) -> None:
    """Files can be read by their owner only, and in order closed there is only one."""
    previous = os.umask(0)
    try:
        async with SqliteStore.open(path) as store:
            await store.append(make_batch([make_receipt(1)], signer))
            modes = {
                entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in path.parent.iterdir()
            }
    finally:
        os.umask(previous)
    assert modes == {"anser.db": 0o600, "anser.db-wal": 0o600, "anser.db-shm": 0o600}
    assert [entry.name for entry in path.parent.iterdir()] == ["anser.db"]
    assert not sqlite_schema.unclean(path)


async def test_what_is_stored_is_on_the_disk_and_a_reader_only_reads(path: Path) -> None:
    """COMMIT returns when the disk has it (FULL, past the drive's cache); reads cannot write."""
    async with SqliteStore.open(path) as store:
        for lane, only in ((store._writer, 0), (store._reader, 1)):
            settings = {
                name: await lane.call(_pragma(name))
                for name in ("synchronous", "fullfsync", "journal_mode", "query_only")
            }
            assert settings == {
                "synchronous": 2,
                "fullfsync": 1,
                "journal_mode": "wal",
                "query_only": only,
            }
        with pytest.raises(StoreError, match=r"readonly|read-only"):
            await store._reader.call(lambda reader: reader.execute("DELETE FROM nodes"))


def _pragma(name: str) -> Callable[[sqlite3.Connection], object]:
    """Ask a connection for one of its settings."""
    return lambda connection: connection.execute(f"PRAGMA {name}").fetchone()[0]


async def test_a_call_has_its_deadline(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that does not answer in time fails the call, and a late read is given up."""
    async with SqliteStore.open(path) as store:
        monkeypatch.setattr(limits, "STORE_TIMEOUT_S", 0.2)
        endless = (
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
        )
        with pytest.raises(StoreError, match=r"did not answer within|took longer"):
            await store._reader.call(lambda connection: connection.execute(endless).fetchone())
        monkeypatch.setattr(limits, "STORE_TIMEOUT_S", 20.0)
        assert await store.members() == []


async def test_waiting_calls_have_their_limit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most STORE_CALLS_MAX calls wait for the disk; one more is refused, and later welcome."""
    monkeypatch.setattr(limits, "STORE_CALLS_MAX", 3)
    async with SqliteStore.open(path) as store:
        outcomes = await asyncio.gather(
            *(store.put_member(Member(id=f"m{number}")) for number in range(4)),
            return_exceptions=True,
        )
        assert [type(outcome) for outcome in outcomes] == [*[type(None)] * 3, StoreError]
        store.validate()
        await store.put_member(Member(id="m9"))
        assert len(await store.members()) == 4


async def test_old_sqlite_is_refused_by_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python with too old an SQLite is told at the start, not by a syntax error."""
    monkeypatch.setattr("sqlite3.sqlite_version_info", (3, 36, 0))
    with pytest.raises(StoreError, match=r"brings SQLite .*; Anser needs 3\.37"):
        async with SqliteStore.open(path):
            pass


async def test_closed_store_refuses(path: Path) -> None:
    """A call after the end is refused, not left waiting."""
    async with SqliteStore.open(path) as store:
        assert "closed=False" in repr(store)
    with pytest.raises(StoreError, match="closed"):
        await store.members()
    await store._writer.aclose()
