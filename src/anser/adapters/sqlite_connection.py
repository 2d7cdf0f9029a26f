"""One SQLite connection on one thread of its own, and SQLite's errors in Anser's words.

Theory of operation. A `Lane` owns a thread and the connection that lives on it. Whoever needs the
database sends a function there and waits for its result; the functions of a lane run one after
the other. SQLite releases the interpreter while it works, so the event loop goes on.

Invariants: the connection is touched by its own thread only; at most STORE_CALLS_MAX calls wait;
a call that is no longer awaited has either not begun, and never will, or runs to its end.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path
from time import monotonic
from typing import TypeVar

import anyio

from anser.core import limits
from anser.core.errors import StoreCorrupt, StoreError, StoreFull, StoreLocked

__all__ = ["Lane", "connect", "corrupt", "queries", "sql_text", "transaction", "translated"]

T = TypeVar("T")
_SQL = files("anser.adapters") / "sql"
_STEPS = 100_000  # of SQLite's machine between two looks at the time, about a millisecond
_SETTINGS = (
    "foreign_keys = ON",
    "trusted_schema = OFF",
    "cell_size_check = ON",  # find damage where it is, not later
    "synchronous = FULL",  # durable when COMMIT returns
    "fullfsync = ON",  # macOS: past the drive's cache
)
_LOCKED = (StoreLocked, "locked by another process; stop what else uses it")
_FAILING = (StoreFull, "cannot be written: the disk is full, over its quota, or failing")
_READ_ONLY = (StoreFull, "cannot be written: the file, its folder or the disk is read-only")
_MEANINGS: dict[int, tuple[type[StoreError], str]] = {
    sqlite3.SQLITE_BUSY: _LOCKED,
    sqlite3.SQLITE_LOCKED: _LOCKED,
    sqlite3.SQLITE_PROTOCOL: _LOCKED,
    sqlite3.SQLITE_FULL: (StoreFull, "cannot grow: the disk is full; free some space"),
    sqlite3.SQLITE_READONLY: _READ_ONLY,
    sqlite3.SQLITE_CANTOPEN: _READ_ONLY,
    sqlite3.SQLITE_PERM: _READ_ONLY,
    sqlite3.SQLITE_IOERR_WRITE: _FAILING,
    sqlite3.SQLITE_IOERR_FSYNC: _FAILING,
    sqlite3.SQLITE_IOERR_DIR_FSYNC: _FAILING,
    sqlite3.SQLITE_IOERR_TRUNCATE: _FAILING,
    sqlite3.SQLITE_IOERR_SHMSIZE: _FAILING,
    sqlite3.SQLITE_IOERR_SHMOPEN: _FAILING,
    sqlite3.SQLITE_INTERRUPT: (
        StoreError,
        f"the question took longer than {limits.STORE_TIMEOUT_S:g} s",
    ),
}


class Lane:
    """A thread with its connection. `deadline`: whether SQLite gives up on what takes too long."""

    def __init__(self, path: Path, *, name: str, deadline: bool) -> None:
        self._path = path
        self._name = name
        self._deadline = deadline
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"anser-{name}")
        self._connection: sqlite3.Connection | None = None
        self._closed = False
        self._waiting = 0

    def __repr__(self) -> str:
        return f"<Lane {self._name} closed={self._closed} waiting={self._waiting}>"

    def validate(self) -> None:
        """Assert the invariants."""
        assert 0 <= self._waiting <= limits.STORE_CALLS_MAX

    async def open(self, prepare: Callable[[sqlite3.Connection], None]) -> None:
        """Connect, and let `prepare` run first. Raises StoreError; then the lane is closed."""
        try:
            # No deadline: checking and migrating a large file takes what it takes.
            await asyncio.wrap_future(self._executor.submit(self._open, prepare))
        except BaseException:
            await self.aclose()
            raise

    async def call(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` on the lane's thread. Raises StoreError, also after STORE_TIMEOUT_S."""
        if self._closed:
            raise StoreError("The store is closed.")
        if self._waiting >= limits.STORE_CALLS_MAX:
            raise StoreError("Too many calls wait for the disk.")
        self._waiting += 1
        try:
            async with asyncio.timeout(limits.STORE_TIMEOUT_S):
                return await asyncio.wrap_future(self._executor.submit(self._run, work))
        except TimeoutError:
            message = f"{self._path} did not answer within {limits.STORE_TIMEOUT_S:g} s."
            raise StoreError(message) from None
        finally:
            self._waiting -= 1

    async def aclose(self) -> None:
        """Close the connection after what runs, and end the thread. Idempotent."""
        if self._closed:
            return
        self._closed = True
        with anyio.move_on_after(limits.STORE_TIMEOUT_S, shield=True):
            await asyncio.wrap_future(self._executor.submit(self._close))
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _open(self, prepare: Callable[[sqlite3.Connection], None]) -> None:
        with translated(self._path):
            self._connection = connect(self._path)
            prepare(self._connection)

    def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        connection = self._connection
        assert connection is not None
        if self._deadline:
            until = monotonic() + limits.STORE_TIMEOUT_S
            connection.set_progress_handler(lambda: monotonic() > until, _STEPS)
        with translated(self._path):
            return work(connection)

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def connect(path: Path) -> sqlite3.Connection:
    """A connection in autocommit mode: transactions begin and end where the code says so."""
    connection = sqlite3.connect(path, timeout=limits.STORE_BUSY_S, isolation_level=None)
    try:
        for setting in _SETTINGS:
            connection.execute(f"PRAGMA {setting}")
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def transaction(connection: sqlite3.Connection) -> Generator[None]:
    """All or nothing: commits at the end, rolls back on any error."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


@contextmanager
def translated(path: Path) -> Generator[None]:
    """Turn SQLite's errors into the store's. A misuse of the module is a bug and passes."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise
    except sqlite3.Error as error:
        raise _translate(error, path) from error


@cache
def queries(noun: str) -> dict[str, str]:
    """The named queries of sql/NOUN.sql: each begins with a line `-- name: NAME`."""
    parts = sql_text(f"{noun}.sql").split("-- name: ")[1:]
    named = (part.partition("\n") for part in parts)
    return {name.strip(): text.strip() for name, _, text in named}


def sql_text(name: str) -> str:
    """The text of one file in sql/."""
    return (_SQL / name).read_text(encoding="utf-8")


def corrupt(path: Path, what: str) -> StoreCorrupt:
    """The error of a damaged file, with its cure."""
    return StoreCorrupt(
        f"{path} is damaged ({what}). Stop Anser and put a backup in its place; without one, save"
        f" what can be read with `sqlite3 {path} .recover`, or move the file away to start anew."
    )


def _translate(error: sqlite3.Error, path: Path) -> StoreError:
    code: int = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    primary = code & 0xFF  # the rest says more
    if primary in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}:
        return corrupt(path, str(error))
    kind, text = _MEANINGS.get(code) or _MEANINGS.get(primary) or (StoreError, str(error))
    return kind(f"{path}: {text}.")
